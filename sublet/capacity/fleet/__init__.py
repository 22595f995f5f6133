"""The fleet: which sites, pools, nodes and devices there are, in which state, at what cost.

Owns     sites, pools, nodes, devices, the table of node states, fence tables as found, cost facts.
Always   a device is sellable only while its node is in production and it is healthy; a device that
         blips for fewer than three looks or less than a minute changes nothing; a node moves only
         along the table in `states`.
Callers  the app enrols what an engine finds and looks again; compute reports starts and drains;
         allocation asks what may be sold; market and economics read cost facts.
"""

from sublet.capacity.fleet.costs import floor_micros_per_device_hour
from sublet.capacity.fleet.model import (
    Cost,
    CostFactsMissing,
    Device,
    DeviceDown,
    DeviceUp,
    Node,
    NodeEnrolled,
    NodeNotFound,
    NodeStateChanged,
    NodeStateRefused,
    Pool,
    PoolNotFound,
    Site,
    missing_for_strangers,
)
from sublet.capacity.fleet.roster import Roster, get_roster, list_rosters, sellable_devices
from sublet.capacity.fleet.service import (
    enrol,
    get_cost,
    list_costs,
    load_costs,
    look,
    note_start_failure,
    note_start_success,
    resting_use,
    seed_costs,
    set_node_state,
    set_pool,
)
from sublet.capacity.fleet.states import (
    NodeState,
    reachable_states,
)
from sublet.capacity.fleet.store import (
    get_device,
    get_devices,
    get_node,
    get_pool,
    get_site,
    list_devices,
    list_nodes,
    list_pools,
    list_sites,
)

__all__ = [
    "Cost",
    "CostFactsMissing",
    "Device",
    "DeviceDown",
    "DeviceUp",
    "Node",
    "NodeEnrolled",
    "NodeNotFound",
    "NodeState",
    "NodeStateChanged",
    "NodeStateRefused",
    "Pool",
    "PoolNotFound",
    "Roster",
    "Site",
    "enrol",
    "floor_micros_per_device_hour",
    "get_cost",
    "get_device",
    "get_devices",
    "get_node",
    "get_pool",
    "get_roster",
    "get_site",
    "list_costs",
    "list_devices",
    "list_nodes",
    "list_pools",
    "list_rosters",
    "list_sites",
    "load_costs",
    "look",
    "missing_for_strangers",
    "note_start_failure",
    "note_start_success",
    "reachable_states",
    "resting_use",
    "seed_costs",
    "sellable_devices",
    "set_node_state",
    "set_pool",
]
