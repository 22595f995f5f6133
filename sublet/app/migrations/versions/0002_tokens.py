"""Tokens: the models shop, the usage of tokens, allowances, limits."""

import sqlalchemy as sa
from alembic import op

from sublet.base.store import types

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "billing_allowance",
        sa.Column("gateway", sa.String(length=40), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("serial", sa.BigInteger(), nullable=False),
        sa.Column("granted_micros", sa.BigInteger(), nullable=False),
        sa.Column("settled_micros", sa.BigInteger(), nullable=False),
        sa.Column("granted_tokens", sa.BigInteger(), nullable=True),
        sa.Column("settled_tokens", sa.BigInteger(), nullable=False),
        sa.Column("hold_id", sa.String(length=40), nullable=True),
        sa.Column("expires_at", types.Instant(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.PrimaryKeyConstraint("gateway", "epoch", "key_id", name=op.f("pk_billing_allowance")),
    )
    with op.batch_alter_table("billing_allowance", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_billing_allowance_state_organisation_id"),
            ["state", "organisation_id"],
            unique=False,
        )

    op.create_table(
        "billing_token_line",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("replica_id", sa.String(length=40), nullable=False),
        sa.Column("is_first_party", sa.Boolean(), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("tier", sa.String(length=24), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("token_class", sa.String(length=24), nullable=False),
        sa.Column("price_micros", sa.BigInteger(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("spent_micros", sa.BigInteger(), nullable=False),
        sa.Column("posted_micros", sa.BigInteger(), nullable=False),
        sa.Column("lost_micros", sa.BigInteger(), nullable=False),
        sa.Column("posted_quantity", sa.BigInteger(), nullable=False),
        sa.Column("lost_quantity", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_billing_token_line")),
        sa.UniqueConstraint(
            "key_id",
            "day",
            "model",
            "tier",
            "version",
            "token_class",
            "kind",
            "replica_id",
            name="uq_billing_token_line_what",
        ),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("billing_token_line", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_billing_token_line_organisation_id_day"),
            ["organisation_id", "day"],
            unique=False,
        )
        batch_op.create_index(
            batch_op.f("ix_billing_token_line_replica_id_day"), ["replica_id", "day"], unique=False
        )

    op.create_table(
        "metering_spool",
        sa.Column("gateway", sa.String(length=40), nullable=False),
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("file", sa.Integer(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("opened_at", types.Instant(), nullable=False),
        sa.Column("closed_at", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("gateway", "epoch", name=op.f("pk_metering_spool")),
    )
    with op.batch_alter_table("metering_spool", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_metering_spool_state"), ["state"], unique=False)

    op.create_table(
        "metering_token",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event_id", sa.String(length=80), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=True),
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("is_first_party", sa.Boolean(), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("deployment_id", sa.String(length=40), nullable=False),
        sa.Column("replica_id", sa.String(length=40), nullable=False),
        sa.Column("surface", sa.String(length=24), nullable=False),
        sa.Column("tier", sa.String(length=24), nullable=False),
        sa.Column("price_version", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=24), nullable=False),
        sa.Column("started_us", sa.BigInteger(), nullable=False),
        sa.Column("ended_us", sa.BigInteger(), nullable=False),
        sa.Column("first_us", sa.BigInteger(), nullable=True),
        sa.Column("input_uncached", sa.BigInteger(), nullable=False),
        sa.Column("cache_read", sa.BigInteger(), nullable=False),
        sa.Column("output", sa.BigInteger(), nullable=False),
        sa.Column("made", sa.BigInteger(), nullable=False),
        sa.Column("micros", sa.BigInteger(), nullable=False),
        sa.Column("is_inconsistent", sa.Boolean(), nullable=False),
        sa.Column("gateway", sa.String(length=40), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("corrects", sa.String(length=80), nullable=True),
        sa.Column("recorded_at", types.Instant(), nullable=False),
        sa.CheckConstraint(
            "corrects IS NOT NULL OR (input_uncached >= 0 AND cache_read >= 0 AND output >= 0 AND made >= output AND micros >= 0)",
            name=op.f("ck_metering_token_only_corrections_take_back"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_metering_token")),
        sa.UniqueConstraint("event_id", name=op.f("uq_metering_token_event_id")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("metering_token", schema=None) as batch_op:
        batch_op.create_index(
            "ix_metering_token_corrects",
            ["corrects"],
            unique=False,
            sqlite_where=sa.text("corrects IS NOT NULL"),
            postgresql_where=sa.text("corrects IS NOT NULL"),
        )
        batch_op.create_index(
            batch_op.f("ix_metering_token_key_id_seq"), ["key_id", "seq"], unique=False
        )
        batch_op.create_index(
            batch_op.f("ix_metering_token_organisation_id_seq"),
            ["organisation_id", "seq"],
            unique=False,
        )
        batch_op.create_index(
            batch_op.f("ix_metering_token_replica_id_seq"), ["replica_id", "seq"], unique=False
        )

    op.create_table(
        "metering_token_reading",
        sa.Column("replica_id", sa.String(length=40), nullable=False),
        sa.Column("prompt", sa.BigInteger(), nullable=False),
        sa.Column("cached", sa.BigInteger(), nullable=True),
        sa.Column("predicted", sa.BigInteger(), nullable=False),
        sa.Column("input_uncached", sa.BigInteger(), nullable=False),
        sa.Column("cache_read", sa.BigInteger(), nullable=False),
        sa.Column("made", sa.BigInteger(), nullable=False),
        sa.Column("counted_seq", sa.BigInteger(), nullable=False),
        sa.Column("read_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("replica_id", name=op.f("pk_metering_token_reading")),
    )
    op.create_table(
        "models_deployment",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("devices", sa.Integer(), nullable=False),
        sa.Column("min_replicas", sa.Integer(), nullable=False),
        sa.Column("max_replicas", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("drain_seconds", sa.Integer(), nullable=False),
        sa.Column("idle_seconds", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("wanted", sa.Integer(), nullable=False),
        sa.Column("lower_since", types.Instant(), nullable=True),
        sa.Column("last_asked_at", types.Instant(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("retry_at", types.Instant(), nullable=True),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_models_deployment")),
        sa.UniqueConstraint("id", name=op.f("uq_models_deployment_id")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("models_deployment", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_models_deployment_model"), ["model"], unique=False)
        batch_op.create_index(batch_op.f("ix_models_deployment_state"), ["state"], unique=False)

    op.create_table(
        "models_gauge",
        sa.Column("gateway", sa.String(length=40), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("snapshot", sa.BigInteger(), nullable=False),
        sa.Column("is_alive", sa.Boolean(), nullable=False),
        sa.Column("is_cut_off", sa.Boolean(), nullable=False),
        sa.Column("in_flight", sa.JSON(), nullable=False),
        sa.Column("waiting", sa.JSON(), nullable=False),
        sa.Column("refusals", sa.JSON(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("ejected", sa.JSON(), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("gateway", name=op.f("pk_models_gauge")),
    )
    op.create_table(
        "models_grant",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("granted_at", types.Instant(), nullable=False),
        sa.Column("revoked_at", types.Instant(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_models_grant")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("models_grant", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_models_grant_model"), ["model"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_models_grant_organisation_id"), ["organisation_id"], unique=False
        )

    op.create_table(
        "models_key",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("kek_id", sa.String(length=40), nullable=False),
        sa.Column("wrapped", sa.String(length=200), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_models_key")),
        sa.UniqueConstraint("id", name=op.f("uq_models_key_id")),
    )
    with op.batch_alter_table("models_key", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_models_key_model"), ["model"], unique=False)

    op.create_table(
        "models_model",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("provider", sa.String(length=120), nullable=False),
        sa.Column("is_third_party", sa.Boolean(), nullable=False),
        sa.Column("access", sa.String(length=24), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("licence", sa.String(length=120), nullable=False),
        sa.Column("licence_allows_download", sa.Boolean(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("quantization", sa.String(length=40), nullable=False),
        sa.Column("context", sa.Integer(), nullable=False),
        sa.Column("max_output", sa.Integer(), nullable=False),
        sa.Column("server", sa.String(length=40), nullable=False),
        sa.Column("template", sa.String(length=80), nullable=False),
        sa.Column("tokens_per_device_hour", sa.BigInteger(), nullable=False),
        sa.Column("lifecycle", sa.String(length=24), nullable=False),
        sa.Column("legacy_on", sa.Date(), nullable=True),
        sa.Column("end_of_life_on", sa.Date(), nullable=True),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_models_model")),
        sa.UniqueConstraint("name", name=op.f("uq_models_model_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "models_price",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("tier", sa.String(length=24), nullable=False),
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("effective_from", types.Instant(), nullable=False),
        sa.Column("input_micros", sa.BigInteger(), nullable=False),
        sa.Column("cached_micros", sa.BigInteger(), nullable=False),
        sa.Column("output_micros", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_models_price")),
        sa.UniqueConstraint("version", name=op.f("uq_models_price_version")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("models_price", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_models_price_model_tier_effective_from"),
            ["model", "tier", "effective_from"],
            unique=False,
        )

    op.create_table(
        "models_release",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("replica_id", sa.String(length=40), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("node_id", sa.String(length=40), nullable=False),
        sa.Column("peer_pid", sa.BigInteger(), nullable=False),
        sa.Column("peer_uid", sa.BigInteger(), nullable=False),
        sa.Column("at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_models_release")),
        sa.UniqueConstraint("id", name=op.f("uq_models_release_id")),
    )
    with op.batch_alter_table("models_release", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_models_release_model"), ["model"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_models_release_replica_id"), ["replica_id"], unique=False
        )

    op.create_table(
        "models_replica",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("deployment_id", sa.String(length=40), nullable=False),
        sa.Column("model", sa.String(length=200), nullable=False),
        sa.Column("is_filler", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=24), nullable=False),
        sa.Column("door", sa.Text(), nullable=False),
        sa.Column("has_key", sa.Boolean(), nullable=False),
        sa.Column("created_at", types.Instant(), nullable=False),
        sa.Column("ready_at", types.Instant(), nullable=True),
        sa.Column("draining_at", types.Instant(), nullable=True),
        sa.Column("gone_at", types.Instant(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models_replica")),
    )
    with op.batch_alter_table("models_replica", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_models_replica_deployment_id"), ["deployment_id"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_models_replica_state"), ["state"], unique=False)

    op.create_table(
        "models_snapshot",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("replicas", sa.JSON(), nullable=False),
        sa.Column("made_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_models_snapshot")),
    )
    op.create_table(
        "tenancy_limit",
        sa.Column("scope_kind", sa.String(length=24), nullable=False),
        sa.Column("scope_id", sa.String(length=40), nullable=False),
        sa.Column("organisation_id", sa.String(length=40), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("changed_at", types.Instant(), nullable=False),
        sa.PrimaryKeyConstraint("scope_kind", "scope_id", name=op.f("pk_tenancy_limit")),
    )
    with op.batch_alter_table("tenancy_limit", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_tenancy_limit_organisation_id"), ["organisation_id"], unique=False
        )

    with op.batch_alter_table("compute_workload", schema=None) as batch_op:
        batch_op.create_index("ix_compute_workload_kind_state", ["kind", "state"], unique=False)

    with op.batch_alter_table("market_unmet", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_market_unmet_at"), ["at"], unique=False)


def downgrade() -> None:
    raise RuntimeError("a release is not taken back: restore a copy instead")
