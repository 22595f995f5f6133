"""Rows of the market."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.interval import Interval, from_micros, micros_since_epoch
from sublet.base.kernel.money import Money
from sublet.base.kernel.price import Line, PricePoint
from sublet.base.store import Instant, Json, metadata
from sublet.capacity.allocation import DisplacementRule
from sublet.rights.market.model import (
    CURRENCY,
    Contract,
    ContractState,
    Product,
    Quote,
    SpotPrice,
    Unmet,
)
from sublet.rights.market.ratecard import RateCard, parse_rate_card

rate_cards = sa.Table(
    "market_rate_card",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("effective_from", Instant, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("loaded_at", Instant, nullable=False),
    sa.Column("loaded_by", sa.String(80), nullable=False),
)
"""Versions of the card as the owner wrote them; the text is the truth, offers are read from it."""

spot_prices = sa.Table(
    "market_spot_price",
    metadata,
    sa.Column("pool_id", sa.String(40), primary_key=True),
    sa.Column("hour", Instant, primary_key=True),
    sa.Column("micros", sa.BigInteger, nullable=False),
    sa.Column("floor_micros", sa.BigInteger, nullable=False),
    sa.Column("bid_micros", sa.BigInteger, nullable=False),
    sa.Column("posted_at", Instant, nullable=False),
)

quotes = sa.Table(
    "market_quote",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("project_id", sa.String(40)),
    sa.Column("product", sa.String(24), nullable=False),
    sa.Column("offer_id", sa.String(300), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("whole_node", sa.Boolean, nullable=False),
    sa.Column("notice_seconds", sa.Integer, nullable=False),
    sa.Column("factor_permille", sa.Integer, nullable=False),
    sa.Column("firm_seconds", sa.Integer, nullable=False),
    sa.Column("stop_grace_seconds", sa.Integer, nullable=False),
    sa.Column("scrub_seconds", sa.Integer, nullable=False),
    sa.Column("duration_seconds", sa.BigInteger),
    sa.Column("is_first_party", sa.Boolean, nullable=False),
    sa.Column("points", Json, nullable=False),
    sa.Column("max_price_micros", sa.BigInteger),
    sa.Column("total_micros", sa.BigInteger, nullable=False),
    sa.Column("lines", Json, nullable=False),
    sa.Column("exact_until", Instant),
    sa.Column("hold_micros", sa.BigInteger, nullable=False),
    sa.Column("hold_seconds", sa.Integer, nullable=False),
    sa.Column("credit_rule", sa.Text, nullable=False),
    sa.Column("outbound", sa.String(24), nullable=False),
    sa.Column("missing_fences", Json, nullable=False),
    sa.Column("trusted_tenants", sa.Boolean, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Column("contract_id", sa.String(40)),
    sa.Column("currency", sa.String(3), nullable=False),
)

contracts = sa.Table(
    "market_contract",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("project_id", sa.String(40)),
    sa.Column("key_id", sa.String(40)),
    sa.Column("quote_id", sa.String(40), nullable=False, unique=True),
    sa.Column("subject", sa.String(40), nullable=False, index=True),
    sa.Column("product", sa.String(24), nullable=False),
    sa.Column("offer_id", sa.String(300), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("whole_node", sa.Boolean, nullable=False),
    sa.Column("notice_seconds", sa.Integer, nullable=False),
    sa.Column("factor_permille", sa.Integer, nullable=False),
    sa.Column("firm_seconds", sa.Integer, nullable=False),
    sa.Column("stop_grace_seconds", sa.Integer, nullable=False),
    sa.Column("scrub_seconds", sa.Integer, nullable=False),
    sa.Column("rule", sa.String(24), nullable=False),
    sa.Column("younger_than_seconds", sa.Integer, nullable=False),
    sa.Column("price_micros", sa.BigInteger, nullable=False),
    sa.Column("points", Json, nullable=False),
    sa.Column("max_price_micros", sa.BigInteger),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("started_at", Instant, nullable=False),
    sa.Column("ended_at", Instant),
    sa.Column("currency", sa.String(3), nullable=False),
)

free_windows = sa.Table(
    "market_free_window",
    metadata,
    sa.Column("contract_id", sa.String(40), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("starts_at", Instant, primary_key=True),
    sa.Column("ends_at", Instant, nullable=False),
    sa.Column("t0", Instant),
    sa.Column("reason", sa.String(40), nullable=False),
    sa.Column("at", Instant, nullable=False),
)
"""Parts of runs that are free because the owner ended them; what was metered there is credited."""

postings = sa.Table(
    "market_posting",
    metadata,
    sa.Column("contract_id", sa.String(40), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(24), primary_key=True),
    sa.Column("month", Instant, primary_key=True),
    sa.Column("price_from", Instant, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("micros", sa.BigInteger, nullable=False),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    sa.Column("ends_at", Instant, nullable=False),
)
"""How far each line of a contract is posted: the next post is the line's total less `micros`."""

unmet = sa.Table(
    "market_unmet",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("pool_id", sa.String(40)),
    sa.Column("offer_id", sa.String(300)),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("duration_seconds", sa.BigInteger),
    sa.Column("price_micros", sa.BigInteger),
    sa.Column("reason", sa.String(40), nullable=False),
    sa.Column("at", Instant, nullable=False, index=True),
)


def list_rate_cards(tx: Connection) -> list[RateCard]:
    """Every version, oldest first."""
    rows = tx.execute(sa.select(rate_cards).order_by(rate_cards.c.version))
    return [
        RateCard(
            version=row.version,
            effective_from=row.effective_from,
            text=row.text,
            offers=parse_rate_card(row.text),
        )
        for row in rows
    ]


def insert_rate_card(tx: Connection, card: RateCard, *, at: datetime, by: str) -> None:
    tx.execute(
        rate_cards.insert().values(
            version=card.version,
            effective_from=card.effective_from,
            text=card.text,
            loaded_at=at,
            loaded_by=by,
        )
    )


def insert_spot_prices(tx: Connection, rows: Sequence[SpotPrice]) -> None:
    if rows:
        tx.execute(spot_prices.insert(), [asdict(row) for row in rows])


# What every quote and rent runs is built once: building a statement costs more than running it.
_HOURS = (
    sa.select(spot_prices)
    .where(spot_prices.c.pool_id == sa.bindparam("pool"))
    .order_by(spot_prices.c.hour)
)
_LAST_HOUR = _HOURS.order_by(None).order_by(spot_prices.c.hour.desc()).limit(1)
_HOURS_SINCE = _HOURS.where(spot_prices.c.hour >= sa.bindparam("start"))
_HOURS_BETWEEN = _HOURS_SINCE.where(spot_prices.c.hour < sa.bindparam("end"))
_HOURS_FROM = _HOURS.where(
    spot_prices.c.hour
    >= sa.func.coalesce(
        sa.select(sa.func.max(spot_prices.c.hour))
        .where(
            spot_prices.c.pool_id == sa.bindparam("pool"),
            spot_prices.c.hour <= sa.bindparam("at"),
        )
        .scalar_subquery(),
        sa.literal_column("0"),
    )
)
_HOUR_AT = _HOURS_FROM.limit(1)


def last_spot_price(tx: Connection, pool_id: str) -> SpotPrice | None:
    """The row of the latest hour posted."""
    return next(_spot(tx, _LAST_HOUR, pool_id), None)


def spot_price_at(tx: Connection, pool_id: str, at: datetime) -> SpotPrice | None:
    """The row in force at that instant: the last one that has begun, else the very first."""
    return next(_spot(tx, _HOUR_AT, pool_id, at=at), None)


def list_spot_prices_from(tx: Connection, pool_id: str, at: datetime) -> list[SpotPrice]:
    """The row in force at that instant, and all that are posted after it."""
    return list(_spot(tx, _HOURS_FROM, pool_id, at=at))


def list_spot_prices(
    tx: Connection, pool_id: str, start: datetime, end: datetime | None
) -> list[SpotPrice]:
    """Rows of hours in `[start, end)`, in order; `end` None is all that is posted."""
    if end is None:
        return list(_spot(tx, _HOURS_SINCE, pool_id, start=start))
    return list(_spot(tx, _HOURS_BETWEEN, pool_id, start=start, end=end))


def _spot(
    tx: Connection, statement: sa.Select[Any], pool_id: str, **values: datetime
) -> Iterator[SpotPrice]:
    rows = tx.execute(statement, {"pool": pool_id, **values}).all()
    return (SpotPrice(**row._mapping) for row in rows)


def insert_quote(tx: Connection, quote: Quote) -> None:
    tx.execute(
        quotes.insert(),
        {
            **_fields(quote),
            "points": _points_out(quote.points),
            "lines": [_line_out(line) for line in quote.lines],
            "missing_fences": list(quote.missing_fences),
        },
    )


_QUOTE = sa.select(quotes).where(quotes.c.id == sa.bindparam("quote"))
_QUOTE_LOCKED = _QUOTE.with_for_update()
_ACCEPT = quotes.update().where(quotes.c.id == sa.bindparam("quote"))


def find_quote(tx: Connection, quote_id: str, *, lock: bool = False) -> Quote | None:
    row = tx.execute(_QUOTE_LOCKED if lock else _QUOTE, {"quote": quote_id}).one_or_none()
    return None if row is None else _quote(row)


def list_quotes(
    tx: Connection, organisation_id: str, after: int | None, limit: int
) -> list[tuple[int, Quote]]:
    query = sa.select(quotes).where(quotes.c.organisation_id == organisation_id)
    if after is not None:
        query = query.where(quotes.c.seq > after)
    rows = tx.execute(query.order_by(quotes.c.seq).limit(limit))
    return [(row.seq, _quote(row)) for row in rows]


def keep_acceptance(tx: Connection, quote_id: str, contract_id: str) -> None:
    tx.execute(_ACCEPT, {"quote": quote_id, "contract_id": contract_id})


def insert_contract(tx: Connection, contract: Contract) -> Contract:
    """Append; returns it with the sequence number given."""
    values = {**_fields(contract), "points": _points_out(contract.points)}
    del values["seq"]
    key = tx.execute(contracts.insert(), values).inserted_primary_key
    assert key is not None
    return replace(contract, seq=int(key[0]))


_CONTRACT = sa.select(contracts).where(contracts.c.id == sa.bindparam("contract"))
_CONTRACT_LOCKED = _CONTRACT.with_for_update()
_CONTRACT_OF = (
    sa.select(contracts)
    .where(contracts.c.subject == sa.bindparam("of"))
    .order_by(contracts.c.seq.desc())
    .limit(1)
)


def find_contract(tx: Connection, contract_id: str, *, lock: bool = False) -> Contract | None:
    statement = _CONTRACT_LOCKED if lock else _CONTRACT
    row = tx.execute(statement, {"contract": contract_id}).one_or_none()
    return None if row is None else _contract(row)


def find_contract_of(tx: Connection, subject: str) -> Contract | None:
    """The latest one of a subject."""
    row = tx.execute(_CONTRACT_OF, {"of": subject}).one_or_none()
    return None if row is None else _contract(row)


def list_contracts(
    tx: Connection,
    *where: sa.ColumnElement[bool],
    after: int | None = None,
    limit: int | None = None,
) -> list[Contract]:
    query = sa.select(contracts).where(*where)
    if after is not None:
        query = query.where(contracts.c.seq > after)
    return [_contract(row) for row in tx.execute(query.order_by(contracts.c.seq).limit(limit))]


def end_contract(tx: Connection, contract_id: str, at: datetime) -> None:
    tx.execute(
        contracts.update()
        .where(contracts.c.id == contract_id)
        .values(state=ContractState.ENDED, ended_at=at)
    )


def keep_free_window(tx: Connection, contract: Contract, free: Interval, **values: Any) -> None:
    """Once: a run is closed once, however often that is told."""
    if free.start not in {known.start for known in list_free_windows(tx, contract.id)}:
        tx.execute(
            free_windows.insert().values(
                contract_id=contract.id,
                organisation_id=contract.organisation_id,
                starts_at=free.start,
                ends_at=free.end,
                **values,
            )
        )


_FREE = (
    sa.select(free_windows)
    .where(free_windows.c.contract_id == sa.bindparam("contract"))
    .order_by(free_windows.c.starts_at)
)
_POSTINGS = sa.select(postings).where(
    postings.c.contract_id == sa.bindparam("contract"), postings.c.kind == sa.bindparam("as_kind")
)
_POST = postings.update().where(
    postings.c.contract_id == sa.bindparam("contract"),
    postings.c.kind == sa.bindparam("as_kind"),
    postings.c.month == sa.bindparam("in_month"),
    postings.c.price_from == sa.bindparam("priced_from"),
)


def list_free_windows(tx: Connection, contract_id: str) -> list[Interval]:
    rows = tx.execute(_FREE, {"contract": contract_id})
    return [Interval(row.starts_at, row.ends_at) for row in rows]


def list_postings(tx: Connection, contract_id: str, kind: str) -> dict[Any, sa.Row[Any]]:
    """How far each line stands, by (month, price_from)."""
    rows = tx.execute(_POSTINGS, {"contract": contract_id, "as_kind": kind})
    return {(row.month, row.price_from): row for row in rows}


def keep_posting(
    tx: Connection, contract: Contract, kind: str, key: tuple[datetime, datetime], **values: Any
) -> None:
    """Set how far a line is posted."""
    month, price_from = key
    line = {"contract": contract.id, "as_kind": kind, "in_month": month, "priced_from": price_from}
    if tx.execute(_POST, {**line, **values}).rowcount == 0:
        tx.execute(
            postings.insert(),
            {
                "contract_id": contract.id,
                "organisation_id": contract.organisation_id,
                "kind": kind,
                "month": month,
                "price_from": price_from,
                **values,
            },
        )


def insert_unmet(tx: Connection, **values: Any) -> None:
    tx.execute(unmet.insert().values(**values))


def was_unmet(tx: Connection, pool_id: str, reason: str, since: datetime) -> bool:
    newest = sa.select(unmet).where(unmet.c.at >= since, unmet.c.pool_id == pool_id)
    return tx.execute(newest.where(unmet.c.reason == reason).limit(1)).first() is not None


def list_unmet(tx: Connection, after: int | None, limit: int) -> list[Unmet]:
    query = sa.select(unmet)
    if after is not None:
        query = query.where(unmet.c.seq > after)
    rows = tx.execute(query.order_by(unmet.c.seq).limit(limit))
    return [Unmet(**row._asdict()) for row in rows]


def _fields(value: Quote | Contract) -> dict[str, Any]:
    """Fields as they are: `asdict` would take points and lines apart."""
    return {name: getattr(value, name) for name in type(value).__dataclass_fields__}


def _points_out(points: Sequence[PricePoint]) -> list[dict[str, Any]]:
    return [
        {"from_us": micros_since_epoch(p.starts_at), "micros": p.micros, "version": p.version}
        for p in points
    ]


def _points_in(found: Sequence[Mapping[str, Any]]) -> tuple[PricePoint, ...]:
    return tuple(
        PricePoint(starts_at=from_micros(p["from_us"]), micros=p["micros"], version=p["version"])
        for p in found
    )


_LINE_INSTANTS = ("month", "start", "end")


def _line_out(line: Line) -> dict[str, Any]:
    values = {name: getattr(line, name) for name in Line.__dataclass_fields__}
    for name in _LINE_INSTANTS:
        values[name] = micros_since_epoch(values[name])
    values["amount"] = line.amount.micros
    return values


def _line_in(found: Mapping[str, Any]) -> Line:
    values = dict(found)
    for name in _LINE_INSTANTS:
        values[name] = from_micros(values[name])
    values["amount"] = Money(values["amount"], CURRENCY)
    return Line(**values)


def _quote(row: sa.Row[Any]) -> Quote:
    values = row._asdict()
    del values["seq"]
    values["product"] = Product(row.product)
    values["points"] = _points_in(row.points)
    values["lines"] = tuple(_line_in(line) for line in row.lines)
    values["missing_fences"] = tuple(row.missing_fences)
    return Quote(**values)


def _contract(row: sa.Row[Any]) -> Contract:
    values = row._asdict()
    values["product"] = Product(row.product)
    values["rule"] = DisplacementRule(row.rule)
    values["state"] = ContractState(row.state)
    values["points"] = _points_in(row.points)
    return Contract(**values)
