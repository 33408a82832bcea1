"""The commit of a push: what is reported when its answer is lost, late, false or nonsense is what the repository holds."""

# ruff: noqa: F811  pytest hands fixtures over by name

import json

import pytest
from hubcases import files_of, hub, model  # noqa: F401  fixtures among them
from hubserver import Fault

import reshard
from reshard.hub import patience


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


def commits(hub) -> int:
    return len(hub.requests(method="POST", path="/api/models/ada/name/commit/"))


def holds(hub, model, branch="main") -> bool:
    return hub.files("ada/name", branch).items() >= files_of(model).items()


@pytest.mark.parametrize("fault", [Fault(lose=True), Fault(lose=True, status=502), Fault(lose=True, status=500), Fault(lose=True, status=408), Fault(lose=True, status=412),
                                   Fault(lose=True, status=200), Fault(lose=True, status=429), Fault(lose=True, status=504, headers={"Retry-After": "99999999"})],
                         ids=lambda fault: str(fault.status))  # fmt: skip
def test_commit_whose_answer_is_lost_is_reported_as_made(hub, model, fault):
    """defects.md M10: said "nothing was committed" after a commit"""
    fault.host, fault.path = "hub", "/commit/"
    hub.fault(fault)
    done = reshard.push(model, "hf://ada/name")
    assert done.committed and done.commit == hub.repos["ada/name"].refs["main"] and holds(hub, model) and commits(hub) == 1
    assert not reshard.push(model, "hf://ada/name").committed


@pytest.mark.parametrize(
    "fault", [Fault(lose=True), Fault(lose=True, status=502), Fault(lose=True, status=200)], ids=lambda fault: str(fault.status)
)
def test_lost_answer_opens_one_pull_request_only(hub, model, fault):
    """defects.md M10: --create-pr opened two"""
    hub.add("ada/name", {"x": b"x"}, private=True)
    fault.host, fault.path = "hub", "/commit/"
    hub.fault(fault)
    done = reshard.push(model, "hf://ada/name", create_pr=True)
    assert hub.repos["ada/name"].pulls == 1 and done.pull_request == f"{hub.url}/ada/name/discussions/1" and holds(hub, model, "refs/pr/1")


def test_pull_request_of_somebody_else_is_not_taken_for_ours(hub, model):
    hub.add("ada/name", {"x": b"x"}, private=True)

    def other(hub) -> None:
        repo = hub.repos["ada/name"]
        repo.pulls += 1
        hub.add("ada/name", {"theirs": b"y"}, branch=f"refs/pr/{repo.pulls}")

    hub.fault(Fault(host="hub", path="/commit/", act=other, status=503))
    done = reshard.push(model, "hf://ada/name", create_pr=True)
    assert done.pull_request.endswith("/2") and hub.repos["ada/name"].pulls == 2 and holds(hub, model, "refs/pr/2")


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_commit_that_failed_for_a_moment_is_made(hub, model, status):
    hub.fault(Fault(host="hub", path="/commit/", status=status, times=2))
    done = reshard.push(model, "hf://ada/name")
    assert done.committed and holds(hub, model) and commits(hub) == 3


def test_commit_that_fails_for_good_is_reported_as_not_made(hub, model):
    hub.fault(Fault(host="hub", path="/commit/", status=503, times=99))
    with pytest.raises(reshard.HubError, match="answered 503"):
        reshard.push(model, "hf://ada/name")
    assert set(hub.files("ada/name")) == {".gitattributes"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_commit_that_is_refused_is_not_tried_again(hub, model, status):
    hub.fault(Fault(host="hub", path="/commit/", status=status, times=99))
    with pytest.raises(reshard.HubError):
        reshard.push(model, "hf://ada/name")
    assert commits(hub) == 1 and set(hub.files("ada/name")) == {".gitattributes"}


def test_answer_lost_and_somebody_else_was_faster(hub, model):
    hub.add("ada/name", {"x": b"x"}, private=True)

    def other(hub) -> None:
        hub.add("ada/name", {"config.json": b"{}"})

    hub.fault(Fault(host="hub", path="/commit/", act=other, status=502))
    with pytest.raises(reshard.HubError, match="the branch moved while this was being done; nothing was committed"):
        reshard.push(model, "hf://ada/name")
    assert hub.files("ada/name")["config.json"] == b"{}"


def test_commit_made_and_then_another_on_top_of_it(hub, model):
    """The head is somebody else's, and holds this push: it was committed."""
    hub.fault(Fault(host="hub", path="/commit/", lose=True))
    hub.fault(Fault(host="hub", path="/api/models/ada/name$", skip=3, act=lambda hub: hub.add("ada/name", {"notes.txt": b"n"})))
    done = reshard.push(model, "hf://ada/name")
    assert done.committed and holds(hub, model) and commits(hub) == 1


def test_outcome_that_nobody_can_tell_is_told_as_such(hub, model):
    def gone(hub) -> None:
        hub.fault(Fault(host="hub", path="/api/models/ada/name", status=503, times=99))

    hub.fault(Fault(host="hub", path="/commit/", lose=True, act=gone))
    with pytest.raises(reshard.HubError, match="whether the commit was made is not known") as caught:
        reshard.push(model, "hf://ada/name")
    assert f"{hub.url}/ada/name/commits/main" in caught.value.hint


def test_success_that_is_a_lie_is_found(hub, model):
    head = hub.add("ada/name", {"x": b"x"}, private=True)
    hub.fault(
        Fault(host="hub", path="/commit/", body=json.dumps({"commitUrl": f"{hub.url}/ada/name/commit/{head}", "commitOid": head}).encode())
    )
    with pytest.raises(reshard.HubError, match="the Hub made the commit .*, but .* not there as sent"):
        reshard.push(model, "hf://ada/name")


def test_file_that_the_hub_ignores_is_missed(hub, model):
    """A preupload answer may say that a file is to be ignored: it would be absent, silently."""
    rows = ", ".join(f'{{"path": "{path.name}", "uploadMode": "regular", "shouldIgnore": true, "oid": null}}' for path in model.iterdir())
    hub.fault(Fault(host="hub", path="/preupload/", body=f'{{"files": [{rows}]}}'.encode(), times=99))
    with pytest.raises(reshard.HubError):
        reshard.push(model, "hf://ada/name")


def test_repository_made_public_meanwhile_is_not_pushed_to(hub, model):
    """defects.md Low: repository made public mid-push"""

    def publish(hub) -> None:
        hub.repos["ada/name"].private = False

    hub.fault(Fault(host="hub", path="/preupload/", act=publish))
    with pytest.raises(reshard.DestinationError, match="ada/name is a public repository"):
        reshard.push(model, "hf://ada/name")
    assert commits(hub) == 0 and set(hub.files("ada/name")) == {".gitattributes"}
