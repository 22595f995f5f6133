"""At which price: offers, posted prices, the rate card, cost facts, quotes."""

from __future__ import annotations

from collections.abc import Iterator

from sublet.base.wire import rest
from sublet.sdk.transport import Transport


class Offers:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.Offer]:
        return self._transport.pages("/v1/offers", rest.Offer)

    def get(self, offer_id: str) -> rest.Offer:
        return self._transport.get(f"/v1/offers/{offer_id}", rest.Offer)

    def spot_prices(self, *, pool_id: str | None = None) -> Iterator[rest.SpotPrice]:
        """The posted price of this hour and of the hours already posted."""
        return self._transport.pages("/v1/prices", rest.SpotPrice, pool_id=pool_id)


class RateCards:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self) -> rest.RateCard:
        return self._transport.get("/v1/rate-card", rest.RateCard)

    def put(self, body: rest.RateCardPut, *, version: int) -> rest.RateCard:
        """`version`: the one that this follows."""
        return self._transport.change("PUT", "/v1/rate-card", rest.RateCard, body, version)

    def versions(self) -> Iterator[rest.RateCard]:
        return self._transport.pages("/v1/rate-card/versions", rest.RateCard)


class CostFacts:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.CostFacts]:
        return self._transport.pages("/v1/cost-facts", rest.CostFacts)

    def put(self, body: rest.CostFactsPut) -> rest.Page[rest.CostFacts]:
        return self._transport.change(
            "PUT", "/v1/cost-facts", rest.Page[rest.CostFacts], body, None
        )


class Quotes:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, body: rest.QuoteCreate, *, idempotency_key: str | None = None) -> rest.Quote:
        return self._transport.post("/v1/quotes", rest.Quote, body, idempotency_key=idempotency_key)

    def get(self, quote_id: str) -> rest.Quote:
        return self._transport.get(f"/v1/quotes/{quote_id}", rest.Quote)
