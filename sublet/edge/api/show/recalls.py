"""Recalls and shortfalls as they are shown."""

from __future__ import annotations

from sublet.base.kernel.money import Money
from sublet.base.wire import rest
from sublet.rights import owner


def recall(found: owner.Recall, currency: str) -> rest.Recall:
    victims = [victim for row in found.rows for victim in row.victims]

    def money(micros: int) -> rest.Money:
        return rest.Money.of(Money(micros, currency))

    return rest.Recall(
        id=found.id,
        seq=found.seq,
        pool_id=found.pool_id,
        devices=found.devices,
        count=found.count,
        by=found.by,
        until=found.until,
        state=found.state.value,
        late=found.is_late,
        planned_at=found.planned_at,
        expires_at=found.expires_at,
        accepted_at=found.accepted_at,
        delivered_at=found.delivered_at,
        ended_at=found.ended_at,
        rows=[_row(row, currency) for row in found.rows],
        shortfall_devices=found.shortfall_devices,
        shortfall_earliest_at=found.shortfall_earliest_at,
        buy_back=None if found.buy_back_micros is None else money(found.buy_back_micros),
        gap=money(found.gap_micros),
        lost_revenue=money(sum(victim.lost_revenue_micros for victim in victims)),
        credits=money(sum(victim.credit_micros for victim in victims)),
        version=found.version,
    )


def _row(row: owner.RecallRow, currency: str) -> rest.RecallRow:
    return rest.RecallRow(
        number=row.number,
        state=row.state,
        devices=row.devices,
        free_by=row.free_by,
        delivered_at=row.delivered_at,
        claim_id=row.claim_id,
        device_ids=list(row.device_ids),
        victims=[_victim(victim, currency) for victim in row.victims],
    )


def _victim(victim: owner.Victim, currency: str) -> rest.RecallVictim:
    return rest.RecallVictim(
        claim_id=victim.claim_id,
        workload_id=victim.workload_id,
        organisation_id=victim.organisation_id,
        devices=victim.devices,
        notice_at=victim.notice_at,
        term_at=victim.term_at,
        lost_revenue=rest.Money.of(Money(victim.lost_revenue_micros, currency)),
        credit=rest.Money.of(Money(victim.credit_micros, currency)),
    )


def shortfall(found: owner.Shortfall) -> rest.Shortfall:
    return rest.Shortfall(
        id=found.id,
        seq=found.seq,
        recall_id=found.recall_id,
        claim_id=found.claim_id,
        pool_id=found.pool_id,
        devices=found.devices,
        needed_at=found.needed_at,
        earliest_at=found.earliest_at,
        recorded_at=found.recorded_at,
        ended_at=found.ended_at,
    )
