"""The spine: every table of the first release."""

import sqlalchemy as sa
from alembic import op

from sublet.base.store import types

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "allocation_claim",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("holder", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("party", sa.String(length=24), nullable=False),
        sa.Column("urgency", sa.String(length=24), nullable=True),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("whole_node", sa.Boolean(), nullable=False),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=True),
        sa.Column("notice_seconds", sa.Integer(), nullable=True),
        sa.Column("firm_seconds", sa.Integer(), nullable=False),
        sa.Column("stop_seconds", sa.Integer(), nullable=False),
        sa.Column("displacement_rule", sa.String(length=24), nullable=False),
        sa.Column("displacement_younger_than_seconds", sa.Integer(), nullable=False),
        sa.Column("displacement_micros_per_device_hour", sa.BigInteger(), nullable=False),
        sa.Column("value_micros_per_device_hour", sa.BigInteger(), nullable=False),
        sa.Column("parent_claim_id", sa.String(length=40), nullable=True),
        sa.Column("opened_at", types.Instant(), nullable=True),
        sa.Column("noticed_at", types.Instant(), nullable=True),
        sa.Column("notice_reason", sa.String(length=24), nullable=True),
        sa.Column("term_at", types.Instant(), nullable=True),
        sa.Column("free_by", types.Instant(), nullable=True),
        sa.Column("withdrawn_at", types.Instant(), nullable=True),
        sa.Column("displaced_by", sa.String(length=40), nullable=True),
        sa.Column("released_at", types.Instant(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_allocation_claim")),
        sa.UniqueConstraint("id", name=op.f("uq_allocation_claim_id")),
    )
    op.create_index(
        op.f("ix_allocation_claim_holder"), "allocation_claim", ["holder"], unique=False
    )
    op.create_index(
        op.f("ix_allocation_claim_parent_claim_id"),
        "allocation_claim",
        ["parent_claim_id"],
        unique=False,
    )
    op.create_index(
        "ix_allocation_claim_pool_active",
        "allocation_claim",
        ["pool_id", "released_at"],
        unique=False,
    )
    op.create_index(
        "ix_allocation_claim_pool_generation",
        "allocation_claim",
        ["pool_id", "generation"],
        unique=False,
    )
    op.create_table(
        "allocation_placement",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("claim_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("node_id", sa.String(length=40), nullable=False),
        sa.Column("device_id", sa.String(length=40), nullable=False),
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_allocation_placement")),
    )
    op.create_index(
        op.f("ix_allocation_placement_claim_id"), "allocation_placement", ["claim_id"], unique=False
    )
    op.create_index(
        op.f("ix_allocation_placement_pool_id"), "allocation_placement", ["pool_id"], unique=False
    )
    op.create_index(
        "uq_allocation_placement_held",
        "allocation_placement",
        ["device_id", "level"],
        unique=True,
        sqlite_where=sa.text("ends_at IS NULL"),
        postgresql_where=sa.text("ends_at IS NULL"),
    )
    op.create_table(
        "allocation_pool",
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("firm_shelf_devices", sa.Integer(), nullable=False),
        sa.Column("firm_shelf_until", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("pool_id", name=op.f("pk_allocation_pool")),
    )
    op.create_table(
        "base_clock_anchor",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("boot_ns", sa.BigInteger(), nullable=False),
        sa.Column("utc_us", sa.BigInteger(), nullable=False),
        sa.Column("rate_ppm", sa.Integer(), nullable=False),
        sa.Column("wall_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_base_clock_anchor")),
    )
    op.create_index(
        op.f("ix_base_clock_anchor_boot_id"), "base_clock_anchor", ["boot_id"], unique=False
    )
    op.create_table(
        "base_installation",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_base_installation")),
    )
    op.create_table(
        "base_outbox",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_base_outbox")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_base_outbox_kind"), "base_outbox", ["kind"], unique=False)
    op.create_table(
        "base_outbox_cursor",
        sa.Column("consumer", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("consumer", name=op.f("pk_base_outbox_cursor")),
    )
    op.create_table(
        "billing_account",
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("opened_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("organisation_id", name=op.f("pk_billing_account")),
        sa.UniqueConstraint("email", name=op.f("uq_billing_account_email")),
    )
    op.create_table(
        "billing_invoice",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("month", types.Instant(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("closes_at", types.Instant(), nullable=False),
        sa.Column("issued_at", types.Instant(), nullable=False),
        sa.Column("total_micros", sa.BigInteger(), nullable=False),
        sa.Column("total_minor", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_billing_invoice")),
        sa.UniqueConstraint("id", name=op.f("uq_billing_invoice_id")),
        sa.UniqueConstraint(
            "organisation_id", "month", name=op.f("uq_billing_invoice_organisation_id_month")
        ),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "billing_line",
        sa.Column("invoice_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("product", sa.String(length=64), nullable=False),
        sa.Column("charge_class", sa.String(length=24), nullable=False),
        sa.Column("contract_id", sa.String(length=40), nullable=True),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("subject", sa.String(length=80), nullable=True),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("price_micros", sa.BigInteger(), nullable=True),
        sa.Column("per", sa.BigInteger(), nullable=True),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("amount_micros", sa.BigInteger(), nullable=False),
        sa.Column("shown_minor", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("invoice_id", "number", name=op.f("pk_billing_line")),
    )
    op.create_index(
        op.f("ix_billing_line_organisation_id"), "billing_line", ["organisation_id"], unique=False
    )
    op.create_table(
        "billing_warning",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("workload_id", sa.String(length=40), nullable=False),
        sa.Column("cause", sa.String(length=24), nullable=False),
        sa.Column("threshold_seconds", sa.Integer(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=False),
        sa.Column("said_at", types.Instant(), nullable=False),
        sa.Column("cleared_at", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_billing_warning")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_billing_warning_workload_id"), "billing_warning", ["workload_id"], unique=False
    )
    op.create_table(
        "billing_watch",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("next_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_billing_watch")),
    )
    op.create_index(
        op.f("ix_billing_watch_organisation_id"), "billing_watch", ["organisation_id"], unique=False
    )
    op.create_table(
        "compute_run",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("workload_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("claim_id", sa.String(length=40), nullable=False),
        sa.Column("contract_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("node_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.JSON(), nullable=False),
        sa.Column("device_ids", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("intended_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=True),
        sa.Column("notice_seconds", sa.Integer(), nullable=False),
        sa.Column("started_at", types.Instant(), nullable=True),
        sa.Column("t0", types.Instant(), nullable=True),
        sa.Column("notice_reason", sa.String(length=24), nullable=True),
        sa.Column("term_at", types.Instant(), nullable=True),
        sa.Column("published_at", types.Instant(), nullable=True),
        sa.Column("stop_reason", sa.String(length=24), nullable=True),
        sa.Column("stop_grace_seconds", sa.Integer(), nullable=False),
        sa.Column("runway_until", types.Instant(), nullable=False),
        sa.Column("runway_sent", types.Instant(), nullable=False),
        sa.Column("exited_at", types.Instant(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.Column("gone_at", types.Instant(), nullable=True),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("is_forgotten", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_compute_run")),
        sa.UniqueConstraint("id", name=op.f("uq_compute_run_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_compute_run_claim_id"), "compute_run", ["claim_id"], unique=False)
    op.create_index(op.f("ix_compute_run_state"), "compute_run", ["state"], unique=False)
    op.create_index(
        op.f("ix_compute_run_workload_id"), "compute_run", ["workload_id"], unique=False
    )
    op.create_table(
        "compute_transition",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("workload_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("from_state", sa.String(length=24), nullable=True),
        sa.Column("event", sa.String(length=24), nullable=False),
        sa.Column("to_state", sa.String(length=24), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_compute_transition")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_compute_transition_workload_id"),
        "compute_transition",
        ["workload_id"],
        unique=False,
    )
    op.create_table(
        "compute_workload",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("contract_id", sa.String(length=40), nullable=False),
        sa.Column("party", sa.String(length=24), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("desired", sa.String(length=24), nullable=False),
        sa.Column("reason", sa.String(length=24), nullable=True),
        sa.Column("claim_id", sa.String(length=40), nullable=True),
        sa.Column("waiting_since", types.Instant(), nullable=True),
        sa.Column("retries", sa.Integer(), nullable=False),
        sa.Column("start_failures", sa.Integer(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("ended_at", types.Instant(), nullable=True),
        sa.Column("has_home", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_compute_workload")),
        sa.UniqueConstraint("id", name=op.f("uq_compute_workload_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_compute_workload_contract_id"), "compute_workload", ["contract_id"], unique=False
    )
    op.create_index(
        op.f("ix_compute_workload_organisation_id"),
        "compute_workload",
        ["organisation_id"],
        unique=False,
    )
    op.create_index(op.f("ix_compute_workload_state"), "compute_workload", ["state"], unique=False)
    op.create_table(
        "fleet_cost",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("purchase_micros", sa.BigInteger(), nullable=False),
        sa.Column("residual_micros", sa.BigInteger(), nullable=False),
        sa.Column("in_service_on", sa.Date(), nullable=False),
        sa.Column("life_months", sa.Integer(), nullable=False),
        sa.Column("idle_watts", sa.Integer(), nullable=False),
        sa.Column("busy_watts", sa.Integer(), nullable=False),
        sa.Column("wear_micros_per_device_hour", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.String(length=1000), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_fleet_cost")),
        sa.UniqueConstraint("name", name=op.f("uq_fleet_cost_name")),
    )
    op.create_table(
        "fleet_site",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("region", sa.String(length=1000), nullable=False),
        sa.Column("pue_permille", sa.Integer(), nullable=False),
        sa.Column("tariff_micros_per_kwh", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_fleet_site")),
        sa.UniqueConstraint("id", name=op.f("uq_fleet_site_id")),
        sa.UniqueConstraint("name", name=op.f("uq_fleet_site_name")),
    )
    op.create_table(
        "ledger_account",
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("balance_micros", sa.BigInteger(), nullable=False),
        sa.Column("held_micros", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_ledger_account")),
    )
    op.create_table(
        "ledger_hold",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("account", sa.String(length=80), nullable=False),
        sa.Column("amount_micros", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("subject", sa.String(length=80), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("expires_at", types.Instant(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("admitted_at", types.Instant(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.CheckConstraint("amount_micros >= 0", name=op.f("ck_ledger_hold_not_negative")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_hold")),
    )
    op.create_index(
        op.f("ix_ledger_hold_organisation_id_state"),
        "ledger_hold",
        ["organisation_id", "state"],
        unique=False,
    )
    op.create_index(
        op.f("ix_ledger_hold_state_expires_at"),
        "ledger_hold",
        ["state", "expires_at"],
        unique=False,
    )
    op.create_index(
        "uq_ledger_hold_open_subject",
        "ledger_hold",
        ["subject"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_table(
        "ledger_transfer",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("debit", sa.String(length=80), nullable=False),
        sa.Column("credit", sa.String(length=80), nullable=False),
        sa.Column("amount_micros", sa.BigInteger(), nullable=False),
        sa.Column("charge_micros", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("subject", sa.String(length=80), nullable=True),
        sa.Column("contract_id", sa.String(length=40), nullable=True),
        sa.Column("starts_at", types.Instant(), nullable=True),
        sa.Column("ends_at", types.Instant(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.CheckConstraint("amount_micros > 0", name=op.f("ck_ledger_transfer_positive")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_ledger_transfer")),
        sa.UniqueConstraint("id", name=op.f("uq_ledger_transfer_id")),
        sa.UniqueConstraint("key", name=op.f("uq_ledger_transfer_key")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_ledger_transfer_at"), "ledger_transfer", ["at"], unique=False)
    op.create_index(
        op.f("ix_ledger_transfer_contract_id_kind"),
        "ledger_transfer",
        ["contract_id", "kind"],
        unique=False,
    )
    op.create_index(op.f("ix_ledger_transfer_credit"), "ledger_transfer", ["credit"], unique=False)
    op.create_index(op.f("ix_ledger_transfer_debit"), "ledger_transfer", ["debit"], unique=False)
    op.create_index(
        op.f("ix_ledger_transfer_key_id_at"), "ledger_transfer", ["key_id", "at"], unique=False
    )
    op.create_index(
        op.f("ix_ledger_transfer_organisation_id_at"),
        "ledger_transfer",
        ["organisation_id", "at"],
        unique=False,
    )
    op.create_index(
        op.f("ix_ledger_transfer_project_id_at"),
        "ledger_transfer",
        ["project_id", "at"],
        unique=False,
    )
    op.create_table(
        "market_contract",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("quote_id", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.String(length=40), nullable=False),
        sa.Column("product", sa.String(length=24), nullable=False),
        sa.Column("offer_id", sa.String(length=300), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("whole_node", sa.Boolean(), nullable=False),
        sa.Column("notice_seconds", sa.Integer(), nullable=False),
        sa.Column("factor_permille", sa.Integer(), nullable=False),
        sa.Column("firm_seconds", sa.Integer(), nullable=False),
        sa.Column("stop_grace_seconds", sa.Integer(), nullable=False),
        sa.Column("scrub_seconds", sa.Integer(), nullable=False),
        sa.Column("rule", sa.String(length=24), nullable=False),
        sa.Column("younger_than_seconds", sa.Integer(), nullable=False),
        sa.Column("price_micros", sa.BigInteger(), nullable=False),
        sa.Column("points", sa.JSON(), nullable=False),
        sa.Column("max_price_micros", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("started_at", types.Instant(), nullable=False),
        sa.Column("ended_at", types.Instant(), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_market_contract")),
        sa.UniqueConstraint("id", name=op.f("uq_market_contract_id")),
        sa.UniqueConstraint("quote_id", name=op.f("uq_market_contract_quote_id")),
    )
    op.create_index(
        op.f("ix_market_contract_organisation_id"),
        "market_contract",
        ["organisation_id"],
        unique=False,
    )
    op.create_index(op.f("ix_market_contract_state"), "market_contract", ["state"], unique=False)
    op.create_index(
        op.f("ix_market_contract_subject"), "market_contract", ["subject"], unique=False
    )
    op.create_table(
        "market_free_window",
        sa.Column("contract_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=False),
        sa.Column("t0", types.Instant(), nullable=True),
        sa.Column("reason", sa.String(length=40), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("contract_id", "starts_at", name=op.f("pk_market_free_window")),
    )
    op.create_table(
        "market_posting",
        sa.Column("contract_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("month", types.Instant(), nullable=False),
        sa.Column("price_from", types.Instant(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("micros", sa.BigInteger(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint(
            "contract_id", "kind", "month", "price_from", name=op.f("pk_market_posting")
        ),
    )
    op.create_table(
        "market_quote",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("product", sa.String(length=24), nullable=False),
        sa.Column("offer_id", sa.String(length=300), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("whole_node", sa.Boolean(), nullable=False),
        sa.Column("notice_seconds", sa.Integer(), nullable=False),
        sa.Column("factor_permille", sa.Integer(), nullable=False),
        sa.Column("firm_seconds", sa.Integer(), nullable=False),
        sa.Column("stop_grace_seconds", sa.Integer(), nullable=False),
        sa.Column("scrub_seconds", sa.Integer(), nullable=False),
        sa.Column("duration_seconds", sa.BigInteger(), nullable=True),
        sa.Column("is_first_party", sa.Boolean(), nullable=False),
        sa.Column("points", sa.JSON(), nullable=False),
        sa.Column("max_price_micros", sa.BigInteger(), nullable=True),
        sa.Column("total_micros", sa.BigInteger(), nullable=False),
        sa.Column("lines", sa.JSON(), nullable=False),
        sa.Column("exact_until", types.Instant(), nullable=True),
        sa.Column("hold_micros", sa.BigInteger(), nullable=False),
        sa.Column("hold_seconds", sa.Integer(), nullable=False),
        sa.Column("credit_rule", sa.Text(), nullable=False),
        sa.Column("outbound", sa.String(length=24), nullable=False),
        sa.Column("missing_fences", sa.JSON(), nullable=False),
        sa.Column("trusted_tenants", sa.Boolean(), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("expires_at", types.Instant(), nullable=False),
        sa.Column("contract_id", sa.String(length=40), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_market_quote")),
        sa.UniqueConstraint("id", name=op.f("uq_market_quote_id")),
    )
    op.create_index(
        op.f("ix_market_quote_organisation_id"), "market_quote", ["organisation_id"], unique=False
    )
    op.create_table(
        "market_rate_card",
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("effective_from", types.Instant(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("loaded_at", types.Instant(), nullable=False),
        sa.Column("loaded_by", sa.String(length=80), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_market_rate_card")),
    )
    op.create_table(
        "market_spot_price",
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("hour", types.Instant(), nullable=False),
        sa.Column("micros", sa.BigInteger(), nullable=False),
        sa.Column("floor_micros", sa.BigInteger(), nullable=False),
        sa.Column("bid_micros", sa.BigInteger(), nullable=False),
        sa.Column("posted_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("pool_id", "hour", name=op.f("pk_market_spot_price")),
    )
    op.create_table(
        "market_unmet",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=True),
        sa.Column("offer_id", sa.String(length=300), nullable=True),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("duration_seconds", sa.BigInteger(), nullable=True),
        sa.Column("price_micros", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.String(length=40), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_market_unmet")),
    )
    op.create_table(
        "metering_meter",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("workload_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("contract_id", sa.String(length=40), nullable=True),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("node_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("party", sa.String(length=24), nullable=False),
        sa.Column("opened_at", types.Instant(), nullable=False),
        sa.Column("metered_to", types.Instant(), nullable=False),
        sa.Column("closed_at", types.Instant(), nullable=True),
        sa.Column("close_reason", sa.String(length=24), nullable=True),
        sa.Column("cpu_ms", sa.BigInteger(), nullable=False),
        sa.Column("last_evidence_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_metering_meter")),
    )
    op.create_index(
        op.f("ix_metering_meter_closed_at"), "metering_meter", ["closed_at"], unique=False
    )
    op.create_index(
        op.f("ix_metering_meter_contract_id"), "metering_meter", ["contract_id"], unique=False
    )
    op.create_index(
        op.f("ix_metering_meter_organisation_id"),
        "metering_meter",
        ["organisation_id"],
        unique=False,
    )
    op.create_index(
        op.f("ix_metering_meter_workload_id"), "metering_meter", ["workload_id"], unique=False
    )
    op.create_table(
        "metering_span",
        sa.Column("device_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("use", sa.String(length=24), nullable=False),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=True),
        sa.Column("ref", sa.String(length=80), nullable=False),
        sa.PrimaryKeyConstraint("device_id", "seq", name=op.f("pk_metering_span")),
    )
    op.create_index(op.f("ix_metering_span_ends_at"), "metering_span", ["ends_at"], unique=False)
    op.create_index(
        "uq_metering_span_open_device",
        "metering_span",
        ["device_id"],
        unique=True,
        sqlite_where=sa.text("ends_at IS NULL"),
        postgresql_where=sa.text("ends_at IS NULL"),
    )
    op.create_table(
        "metering_usage",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event_id", sa.String(length=120), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("contract_id", sa.String(length=40), nullable=True),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("starts_at", types.Instant(), nullable=False),
        sa.Column("ends_at", types.Instant(), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("corrects", sa.String(length=120), nullable=True),
        sa.Column("recorded_at", types.Instant(), nullable=False),
        sa.CheckConstraint(
            "(corrects IS NULL AND devices > 0) OR (corrects IS NOT NULL AND devices < 0)",
            name=op.f("ck_metering_usage_only_corrections_take_back"),
        ),
        sa.CheckConstraint("ends_at > starts_at", name=op.f("ck_metering_usage_has_length")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_metering_usage")),
        sa.UniqueConstraint("event_id", name=op.f("uq_metering_usage_event_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_metering_usage_contract_id_kind"),
        "metering_usage",
        ["contract_id", "kind"],
        unique=False,
    )
    op.create_index(
        op.f("ix_metering_usage_organisation_id_starts_at"),
        "metering_usage",
        ["organisation_id", "starts_at"],
        unique=False,
    )
    op.create_index(
        op.f("ix_metering_usage_run_id_kind_starts_at"),
        "metering_usage",
        ["run_id", "kind", "starts_at"],
        unique=False,
    )
    op.create_table(
        "owner_recall",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("by", types.Instant(), nullable=True),
        sa.Column("until", types.Instant(), nullable=True),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("is_late", sa.Boolean(), nullable=False),
        sa.Column("planned_at", types.Instant(), nullable=False),
        sa.Column("expires_at", types.Instant(), nullable=False),
        sa.Column("accepted_at", types.Instant(), nullable=True),
        sa.Column("delivered_at", types.Instant(), nullable=True),
        sa.Column("ended_at", types.Instant(), nullable=True),
        sa.Column("shortfall_devices", sa.Integer(), nullable=False),
        sa.Column("shortfall_earliest_at", types.Instant(), nullable=True),
        sa.Column("buy_back_micros", sa.BigInteger(), nullable=True),
        sa.Column("gap_micros", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_owner_recall")),
        sa.UniqueConstraint("id", name=op.f("uq_owner_recall_id")),
    )
    op.create_index(op.f("ix_owner_recall_pool_id"), "owner_recall", ["pool_id"], unique=False)
    op.create_index(op.f("ix_owner_recall_state"), "owner_recall", ["state"], unique=False)
    op.create_table(
        "owner_recall_row",
        sa.Column("recall_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("free_by", types.Instant(), nullable=False),
        sa.Column("victims", sa.JSON(), nullable=False),
        sa.Column("claim_id", sa.String(length=40), nullable=True),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("delivered_at", types.Instant(), nullable=True),
        sa.Column("device_ids", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("recall_id", "number", name=op.f("pk_owner_recall_row")),
    )
    op.create_index(
        op.f("ix_owner_recall_row_claim_id"), "owner_recall_row", ["claim_id"], unique=False
    )
    op.create_table(
        "owner_shortfall",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("recall_id", sa.String(length=40), nullable=True),
        sa.Column("claim_id", sa.String(length=40), nullable=True),
        sa.Column("needed_at", types.Instant(), nullable=False),
        sa.Column("earliest_at", types.Instant(), nullable=True),
        sa.Column("recorded_at", types.Instant(), nullable=False),
        sa.Column("ended_at", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_owner_shortfall")),
        sa.UniqueConstraint("id", name=op.f("uq_owner_shortfall_id")),
    )
    op.create_index(
        op.f("ix_owner_shortfall_claim_id"), "owner_shortfall", ["claim_id"], unique=False
    )
    op.create_index(
        op.f("ix_owner_shortfall_pool_id"), "owner_shortfall", ["pool_id"], unique=False
    )
    op.create_index(
        op.f("ix_owner_shortfall_recall_id"), "owner_shortfall", ["recall_id"], unique=False
    )
    op.create_table(
        "tenancy_audit",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.Column("actor_id", sa.String(length=80), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=True),
        sa.Column("address", sa.String(length=80), nullable=False),
        sa.Column("action", sa.String(length=80), nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.Column("result", sa.String(length=80), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tenancy_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_tenancy_audit_organisation_id_seq"),
        "tenancy_audit",
        ["organisation_id", "seq"],
        unique=False,
    )
    op.create_table(
        "tenancy_budget",
        sa.Column("scope_kind", sa.String(length=24), nullable=False),
        sa.Column("scope_id", sa.String(length=40), nullable=False),
        sa.Column("period", sa.String(length=24), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("limit_micros", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("scope_kind", "scope_id", "period", name=op.f("pk_tenancy_budget")),
    )
    op.create_index(
        op.f("ix_tenancy_budget_organisation_id"),
        "tenancy_budget",
        ["organisation_id"],
        unique=False,
    )
    op.create_table(
        "tenancy_idempotency",
        sa.Column("scope", sa.String(length=255), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=True),
        sa.Column("body_digest", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "key", name=op.f("pk_tenancy_idempotency")),
    )
    op.create_index(op.f("ix_tenancy_idempotency_at"), "tenancy_idempotency", ["at"], unique=False)
    op.create_table(
        "tenancy_key",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("principal_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=8), nullable=False),
        sa.Column("role", sa.String(length=24), nullable=True),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("expires_at", types.Instant(), nullable=True),
        sa.Column("revoked_at", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tenancy_key")),
        sa.UniqueConstraint("digest", name=op.f("uq_tenancy_key_digest")),
        sa.UniqueConstraint("id", name=op.f("uq_tenancy_key_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_tenancy_key_organisation_id"), "tenancy_key", ["organisation_id"], unique=False
    )
    op.create_index(
        op.f("ix_tenancy_key_principal_id"), "tenancy_key", ["principal_id"], unique=False
    )
    op.create_table(
        "tenancy_organisation",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("standing", sa.String(length=24), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tenancy_organisation")),
        sa.UniqueConstraint("id", name=op.f("uq_tenancy_organisation_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "uq_tenancy_organisation_owner",
        "tenancy_organisation",
        ["kind"],
        unique=True,
        sqlite_where=sa.text("kind = 'owner'"),
        postgresql_where=sa.text("kind = 'owner'"),
    )
    op.create_table(
        "tenancy_principal",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=True),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("role", sa.String(length=24), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("removed_at", types.Instant(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tenancy_principal")),
        sa.UniqueConstraint("id", name=op.f("uq_tenancy_principal_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_tenancy_principal_email"), "tenancy_principal", ["email"], unique=False
    )
    op.create_index(
        op.f("ix_tenancy_principal_organisation_id"),
        "tenancy_principal",
        ["organisation_id"],
        unique=False,
    )
    op.create_table(
        "tenancy_project",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_tenancy_project")),
        sa.UniqueConstraint("id", name=op.f("uq_tenancy_project_id")),
        sa.UniqueConstraint(
            "organisation_id", "name", name=op.f("uq_tenancy_project_organisation_id_name")
        ),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "fleet_pool",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("site_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("device_kind", sa.String(length=24), nullable=False),
        sa.Column("device_model", sa.String(length=200), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("head_room_percent", sa.Integer(), nullable=False),
        sa.Column("scrub_seconds", sa.Integer(), nullable=False),
        sa.Column("return_promise_seconds", sa.Integer(), nullable=False),
        sa.Column("outbound", sa.String(length=24), nullable=False),
        sa.Column("edition", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["site_id"], ["fleet_site.id"], name=op.f("fk_fleet_pool_site_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_fleet_pool")),
        sa.UniqueConstraint("id", name=op.f("uq_fleet_pool_id")),
        sa.UniqueConstraint("site_id", "name", name=op.f("uq_fleet_pool_site_id_name")),
    )
    op.create_table(
        "fleet_node",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("engine", sa.String(length=24), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("fences", sa.JSON(), nullable=False),
        sa.Column("trusted_tenants", sa.Boolean(), nullable=False),
        sa.Column("start_failures", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["pool_id"], ["fleet_pool.id"], name=op.f("fk_fleet_node_pool_id")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_fleet_node")),
        sa.UniqueConstraint("id", name=op.f("uq_fleet_node_id")),
        sa.UniqueConstraint("name", name=op.f("uq_fleet_node_name")),
    )
    op.create_index(op.f("ix_fleet_node_pool_id"), "fleet_node", ["pool_id"], unique=False)
    op.create_table(
        "fleet_device",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("node_id", sa.String(length=40), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("healthy", sa.Boolean(), nullable=False),
        sa.Column("misses", sa.Integer(), nullable=False),
        sa.Column("missed_since", types.Instant(), nullable=True),
        sa.ForeignKeyConstraint(
            ["node_id"], ["fleet_node.id"], name=op.f("fk_fleet_device_node_id")
        ),
        sa.ForeignKeyConstraint(
            ["pool_id"], ["fleet_pool.id"], name=op.f("fk_fleet_device_pool_id")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_fleet_device")),
        sa.UniqueConstraint("id", name=op.f("uq_fleet_device_id")),
        sa.UniqueConstraint("node_id", "name", name=op.f("uq_fleet_device_node_id_name")),
    )
    op.create_index(op.f("ix_fleet_device_pool_id"), "fleet_device", ["pool_id"], unique=False)


def downgrade() -> None:
    raise RuntimeError("there is nothing before the first release: restore a copy instead")
