"""What a policy behind the gateway may spend, clients that leave it, and a gateway that stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, RateLimitError

from moesaic.errors import ConfigError
from moesaic.llms.gateway import telling
from moesaic.llms.gateway.calls import PICO
from moesaic.llms.gateway.config import read_config
from tests.gateways import Mock, mocking, read_rows, serving
from tests.rounds import (
    ADDS,
    ASKS,
    ENDS,
    KEYS,
    MILLIONTH,
    NAME,
    ask,
    asking,
    begun,
    file_of,
    policy,
    saying,
    until,
)


@pytest.fixture
def mock() -> Iterator[Mock]:
    with mocking() as found:
        found.behaviours["adder"] = saying("four")
        found.behaviours["poet"] = saying("a line of seven words in a row", (9, 5))
        yield found


# -- money -------------------------------------------------------------------------------------------------------------


def test_a_budget_below_one_call_asks_nobody(mock: Mock, tmp_path: Path) -> None:
    says = policy()
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        raw = ask(server, budget="0.000001")
        assert raw.parse().choices[0].message.content == "4"
        assert (mock.got, raw.headers["x-moesaic-cost"]) == ([], "0.000000000")
        assert says.read_ == ["\n\n<information>None</information>\n\n"] * 2
        assert len(server.rows()) == 1
        (line,) = server.trace()
        assert line["budget"] == 1e-6
        assert all("0.000001000 of its budget are left" in r["said"] for r in line["rounds"])


def test_no_call_is_made_that_could_go_beyond_the_budget(mock: Mock, tmp_path: Path) -> None:
    """What the first may cost is reserved, and what it did cost is gone: the second would fit alone, but no longer."""
    with serving(file_of(tmp_path, mock), asking(policy(), max_tokens=100)) as server:
        ask(server)
        first, second = (row["reserved"] for row in server.rows()[1:])
        spent = server.rows()[1]["cost"]
        assert first < second
        for budget, models in (
            (second, ["adder"]),
            (second + spent - 1, ["adder"]),
            (second + spent, ["adder", "poet"]),
        ):
            mock.got.clear()
            ask(server, budget=f"{budget / PICO:.12f}")
            assert mock.names() == models


@pytest.mark.parametrize("budget", ["", "a", "-1", "1e3", "nan", "0x1", "1,5", ".5", "0.1234567890123", "9" * 7])
def test_a_budget_that_is_none_is_refused(mock: Mock, tmp_path: Path, budget: str) -> None:
    with serving(file_of(tmp_path, mock), asking(policy())) as server:
        for name in (NAME, "adder"):
            with pytest.raises(BadRequestError, match="decimal number of USD"):
                ask(server, budget=budget, model=name)
        assert not server.rows()


def test_a_budget_holds_for_every_request_and_the_file_has_a_default(mock: Mock, tmp_path: Path) -> None:
    with serving(file_of(tmp_path, mock, request_budget=1e-6), asking(policy())) as server:
        with pytest.raises(BadRequestError, match="of its budget are left"):
            ask(server, model="adder", max_tokens=8)
        assert ask(server, model="adder", max_tokens=8, budget="0.01").headers["x-moesaic-cost"] == "0.000013000"
        assert ask(server).headers["x-moesaic-cost"] == "0.000000000"
        assert ask(server, budget="0.01").headers["x-moesaic-cost"] == "0.000042000"
    for wrong in (-1, 2e6, float("nan")):
        with pytest.raises(ConfigError, match="request_budget"):
            read_config(file_of(tmp_path, mock, request_budget=wrong))


def test_a_keys_limits_hold_for_searches(mock: Mock, tmp_path: Path) -> None:
    """A search is a request more, in the place of the one that it belongs to."""
    for limit, names in (
        ({"at_once": 1}, ["adder", "poet"]), ({"requests_per_minute": 2}, ["adder"]),
        ({"tokens_per_minute": 100}, []), ({"budget": 1e-5}, []),
    ):  # fmt: skip
        mock.got.clear()
        with serving(
            file_of(tmp_path, mock, keys=[KEYS[0] | limit], ledger=f"{next(iter(limit))}.sqlite"), asking(policy())
        ) as server:
            assert ask(server).parse().choices[0].message.content == "4"
            assert mock.names() == names
    with serving(
        file_of(tmp_path, mock, keys=[KEYS[0] | {"budget": 0.0}], ledger="none.sqlite"), asking(policy())
    ) as server:
        with pytest.raises(RateLimitError):
            ask(server)


# -- clients that leave, and the gateway that stops --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["cancel", "drain", "partial"])
def test_a_client_that_leaves_ends_the_rollout(mock: Mock, tmp_path: Path, how: str, stream: bool) -> None:
    """It leaves while the second search is asked: that is billed as the file says, and no third is made."""
    mock.behaviours["poet"] = saying("a line", (9, 5), wait=0.5)
    says = policy(q=[ADDS, ASKS, ADDS, ENDS], another=[ENDS])
    with serving(file_of(tmp_path, mock, on_disconnect=how), asking(says)) as server:
        line = begun(server, stream=stream)
        if stream:
            found = line.getresponse()
            while b"poet" not in found.fp.readline():  # type: ignore[union-attr]
                pass
            until(lambda: mock.names() == ["adder", "poet"])
            found.close()
        until(lambda: mock.names() == ["adder", "poet"])
        line.close()
        until(lambda: not server.gateway.metrics.running)
        own, first, second = server.rows()
        ended = {"cancel": "cancelled", "drain": "drained", "partial": "partial"}[how]
        assert (own["ended"], own["status"], own["cost"]) == (ended, 499, 0)
        assert (first["ended"], first["cost"]) == ("whole", 13 * MILLIONTH)
        assert (second["ended"], second["status"]) == (ended, 200 if how == "drain" else 499)
        read = second["own_input"]
        assert second["cost"] == {"cancel": 0, "drain": 9 + 4 * 5, "partial": read}[how] * MILLIONTH
        assert says.wrote == [ADDS, ASKS]
        assert len(server.trace()[-1]["rounds"]) == 2
        assert server.gateway.writer.ledger._accounts["k"].reserved == 0
        assert ask(server, "another").parse().choices[0].message.content == "4"


def test_a_client_that_leaves_in_a_generation_frees_the_policy(mock: Mock, tmp_path: Path) -> None:
    says = policy(long=["on and on"], short=[ENDS])
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        line = begun(server, "long")
        until(says.holds.locked)
        line.close()
        assert ask(server, "short").parse().choices[0].message.content == "4"
        assert sorted(row["ended"] for row in server.rows()) == ["partial", "whole"]


def test_a_client_that_takes_nothing_is_left(mock: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TAKING", 0.3)
    says = policy(q=["x" * 10_000_000] * 4)
    with serving(file_of(tmp_path, mock), asking(says, turns=3)) as server:
        line = begun(server, stream=True)
        assert line.getresponse().status == 200
        until(lambda: not server.gateway.metrics.running)
        line.close()
        assert [row["ended"] for row in server.rows()] == ["partial"]


def test_a_gateway_that_stops_lets_rollouts_end(mock: Mock, tmp_path: Path) -> None:
    mock.behaviours["adder"] = saying("four", wait=0.5)
    found = []
    with serving(file_of(tmp_path, mock), asking(policy(q=[ADDS, ADDS, ENDS]))) as server:
        asked = threading.Thread(target=lambda: found.append(ask(server).parse().choices[0].message.content))
        asked.start()
        until(lambda: mock.got)
    asked.join()
    assert (found, mock.names()) == (["4"], ["adder"] * 2)


@pytest.mark.parametrize("where", ["search", "generation"])
def test_a_gateway_that_has_waited_breaks_rollouts_off(mock: Mock, tmp_path: Path, where: str) -> None:
    mock.behaviours["adder"] = saying("four", wait=30)
    says = policy(q=[ADDS, ENDS] if where == "search" else ["on and on"])
    with serving(file_of(tmp_path, mock), asking(says)) as server:
        line = begun(server)
        until(lambda: mock.got or says.holds.locked())
    line.close()
    assert {(row["state"], row["ended"]) for row in read_rows(tmp_path)} == {("settled", "partial")}
    until(lambda: not says.holds.locked())
