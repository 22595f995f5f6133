"""Invoice lines: one ledger, cut into months, each line explained (field cases M2, M4, M5)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.interval import month_of, next_month
from sublet.base.kernel.price import DEVICE_HOUR_MS, Line, PricePoint, Rated, Terms, Window, rate
from sublet.money.billing.invoice import billing_month, closes_at, draft
from sublet.money.billing.model import Charge, ChargeClass, Invoice

OCTOBER = datetime(2026, 10, 1, tzinfo=UTC)
NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def a_charge(
    starts_at: datetime,
    *,
    posted_at: datetime | None = None,
    micros: int = 334_000,
    priced: bool = True,
    kind: str = "usage",
    version: str = "1",
    number: int = 0,
) -> Charge:
    return Charge(
        transfer_id=f"trf_{number}",
        kind=kind,
        product="spot",
        organisation_id="org_1",
        project_id="prj_1",
        subject="ins_1",
        contract_id="con_1",
        starts_at=starts_at,
        ends_at=starts_at + timedelta(minutes=10),
        posted_at=posted_at or starts_at + timedelta(minutes=11),
        quantity=600_000 if priced else 0,
        price_micros=2_004_000 if priced else None,
        per=DEVICE_HOUR_MS if priced else None,
        version=version,
        amount_micros=micros,
        note="interruption credit",
    )


def invoice(month: datetime, charges: Sequence[Charge]) -> Invoice:
    return draft(organisation_id="org_1", month=month, currency="USD", charges=charges)


def test_three_lines_of_a_third_show_as_one() -> None:
    charges = [a_charge(OCTOBER, version=str(i), number=i) for i in range(3)]
    found = invoice(OCTOBER, charges)
    assert [line.amount_micros for line in found.lines] == [334_000] * 3
    assert found.total_micros == 1_002_000
    assert found.total_minor == 100
    assert [line.shown_minor for line in found.lines] == [34, 33, 33]


def test_settlements_of_one_price_are_one_line_that_explains_itself() -> None:
    charges = [a_charge(OCTOBER + timedelta(minutes=10 * i), number=i) for i in range(6)]
    [line] = invoice(OCTOBER, charges).lines
    assert (line.starts_at, line.ends_at) == (OCTOBER, OCTOBER + timedelta(hours=1))
    assert line.quantity == DEVICE_HOUR_MS
    assert line.text == (
        "spot, 2026-10-01T00:00:00.000Z to 2026-10-01T01:00:00.000Z: 3600000 device-ms "
        "× 2.004000 USD per device-hour (price 1) = 2.004000 USD"
    )


def test_a_credit_is_its_own_line_and_names_its_cause() -> None:
    charges = [
        a_charge(OCTOBER),
        a_charge(OCTOBER, micros=-100_000, priced=False, kind="credit", number=1),
        a_charge(OCTOBER, micros=-200_000, priced=False, kind="credit", number=2),
    ]
    found = invoice(OCTOBER, charges)
    assert [line.amount_micros for line in found.lines if line.kind == "credit"] == [
        -100_000,
        -200_000,
    ]
    assert all("interruption credit" in x.text for x in found.lines if x.kind == "credit")
    assert found.total_micros == 34_000


def test_late_use_joins_its_own_month_until_that_closes() -> None:
    used = at("2026-10-31T23:30")
    assert closes_at(OCTOBER) == at("2026-11-04T00:00")
    assert billing_month(used, at("2026-11-03T23:59:59")) == OCTOBER
    assert billing_month(used, at("2026-11-04T00:00")) == NOVEMBER


def test_late_use_after_the_close_is_a_correction_under_its_own_date() -> None:
    late = a_charge(at("2026-10-20T12:00"), posted_at=at("2026-11-05T09:00"))
    assert invoice(OCTOBER, [late]).lines == ()
    [line] = invoice(NOVEMBER, [late]).lines
    assert line.charge_class is ChargeClass.CORRECTION
    assert line.starts_at == at("2026-10-20T12:00")
    assert line.text.startswith("Correction: ")


def test_use_that_comes_a_year_late_goes_on_the_month_open_then() -> None:
    assert billing_month(at("2025-10-20T12:00"), at("2026-11-02T09:00")) == OCTOBER


def posting(
    line: Line, before: dict[tuple[datetime, str], Line], posted_at: datetime, number: int
) -> Charge | None:
    """What settling posts for one rated line: its change since the last settlement."""
    last = before.get((line.month, line.version))
    quantity = line.quantity - (last.quantity if last else 0)
    micros = line.amount.micros - (last.amount.micros if last else 0)
    before[line.month, line.version] = line
    if not (quantity or micros):
        return None
    return Charge(
        transfer_id=f"trf_{number}",
        kind="usage",
        product="spot",
        organisation_id="org_1",
        project_id=None,
        subject="ins_1",
        contract_id="con_1",
        starts_at=line.start,
        ends_at=line.end,
        posted_at=posted_at,
        quantity=quantity,
        price_micros=line.price_micros,
        per=line.per,
        version=line.version,
        amount_micros=micros,
        note="",
    )


changes = st.lists(
    st.tuples(st.integers(1, 100 * 24 * 60), st.integers(0, 9_000_000)),
    max_size=5,
    unique_by=lambda change: change[0],
)
runs = st.lists(
    st.tuples(
        st.integers(1, 40 * 86_400_000),  # how long the run goes on, ms
        st.integers(0, 6 * 86_400),  # how much later that is settled, s
        st.booleans(),  # whether part of it is taken back
    ),
    min_size=1,
    max_size=6,
)


@given(changes, runs, st.integers(1, 8), st.integers(0, 9_000_000))
def test_whatever_is_settled_whenever_the_invoices_sum_to_what_was_posted(
    points: list[tuple[int, int]], parts: list[tuple[int, int, bool]], devices: int, first: int
) -> None:
    start = at("2026-10-15T07:30")
    terms = Terms(
        product="spot",
        currency="USD",
        per=DEVICE_HOUR_MS,
        points=tuple(
            PricePoint(starts_at=start + timedelta(minutes=m), micros=p, version=f"v{m}")
            for m, p in [(0, first), *sorted(points)]
        ),
    )
    windows: list[Window] = []
    before: dict[tuple[datetime, str], Line] = {}
    charges: list[Charge] = []
    here, rated = start, Rated(rate(terms, []).amount, ())
    for length, lag, is_corrected in parts:
        end = here + timedelta(milliseconds=length)
        windows.append(Window(start=here, end=end, units=devices))
        if is_corrected:
            windows.append(Window(start=here, end=here + (end - here) / 2, units=-1))
        here = end
        posted_at = max([end + timedelta(seconds=lag), *(c.posted_at for c in charges)])
        rated = rate(terms, windows)
        made = [
            posting(line, before, posted_at, len(charges) + i) for i, line in enumerate(rated.lines)
        ]
        charges += [charge for charge in made if charge is not None]

    assert sum(charge.amount_micros for charge in charges) == rated.amount.micros
    last = max([*(charge.posted_at for charge in charges), here])
    total, month = 0, month_of(start)
    while month <= last + timedelta(days=40):
        found = invoice(month, charges)
        assert sum(line.amount_micros for line in found.lines) == found.total_micros
        assert sum(line.shown_minor for line in found.lines) == found.total_minor
        for line in found.lines:
            assert line.charge_class is (
                ChargeClass.CORRECTION if month_of(line.starts_at) < month else ChargeClass.REGULAR
            )
            assert month_of(line.starts_at) == month_of(line.ends_at - timedelta(microseconds=1))
        total += found.total_micros
        month = next_month(month)
    assert total == rated.amount.micros


@given(st.lists(st.tuples(st.integers(0, 90 * 86_400), st.integers(0, 90 * 86_400)), max_size=20))
def test_a_closed_month_gains_nothing(used: list[tuple[int, int]]) -> None:
    charges = [
        a_charge(
            OCTOBER + timedelta(seconds=s),
            posted_at=OCTOBER + timedelta(seconds=s + lag),
            number=i,
        )
        for i, (s, lag) in enumerate(used)
    ]
    by_then = [charge for charge in charges if charge.posted_at < closes_at(OCTOBER)]
    assert invoice(OCTOBER, charges) == invoice(OCTOBER, by_then)
    months = [OCTOBER]
    while months[-1] < OCTOBER + timedelta(days=220):
        months.append(next_month(months[-1]))
    assert sum(invoice(m, charges).total_micros for m in months) == sum(
        charge.amount_micros for charge in charges
    )
