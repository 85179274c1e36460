"""What an agent fetches: bases and releases, damaged, gone, superseded, and kept."""

import zlib

import pytest

from edge_agent.facts import Held, ReleaseKept
from federation.protocol import messages as m
from federation.protocol.transfer import content_of, cut
from tests.desk import ATTEMPT, BASE, CONTENT, Desk, assignment


def test_damaged_chunks_are_asked_for_again():
    """A chunk with a wrong checksum is not kept, and is requested anew when its time is up."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    (request,) = desk.take(m.BlobRequest)
    crc32, data = cut(BASE, CONTENT, 0)
    desk.hear(m.BlobChunk(digest=CONTENT.digest, index=0, crc32=crc32 ^ 1, data=data))
    assert desk.held.parts == {}

    asked = ()
    while 0 not in asked:
        desk.wake()
        asked = tuple(i for letter in desk.take(m.BlobRequest) for i in letter.wanted)

    assert 0 in request.wanted


def test_a_content_whose_whole_is_wrong_is_fetched_anew_from_nothing():
    """Every chunk sound and the digest wrong: nothing of it is kept, and nothing is trained."""
    small = content_of(b"x" * 50_000, 16 * 1024)
    desk = Desk().boot().meet()
    desk.hear(assignment(base=small))
    desk.take(m.BlobRequest)

    for index in range(small.chunks):
        data = b"y" * len(cut(b"x" * 50_000, small, index)[1])
        letter = m.BlobChunk(digest=small.digest, index=index, crc32=zlib.crc32(data), data=data)
        desk.hear(letter)

    assert desk.trains == []
    assert desk.held.parts == {}
    assert {i for letter in desk.take(m.BlobRequest) for i in letter.wanted} == set(
        range(small.chunks)
    )


def test_a_base_that_is_gone_ends_the_attempt_with_the_hubs_reason():
    """If the hub no longer has the model, the attempt is given up and the reason passed on."""
    desk = Desk().boot().meet()
    desk.hear(assignment())

    desk.hear(m.BlobGone(digest=CONTENT.digest, reason="the run is over"))

    assert desk.take(m.TaskEvent)[-1].reason == "the run is over"
    assert desk.held == Held()


INFERS = m.Capability(agent="test", infers=True)


def onnx_of(serial):
    return f"model {serial}".encode() * 10_000


def release_of(serial, model=None, run="run"):
    content = content_of(onnx_of(serial if model is None else model), 16 * 1024)
    return m.Release(run=run, round=3, content=content, serial=serial)


def serve(desk, *models):
    """Answer every request for these contents; the indices that were asked for."""
    known = {content_of(data, 16 * 1024).digest: data for data in models}
    asked = []
    while requests := desk.take(m.BlobRequest):
        for request in requests:
            for index in request.wanted:
                asked.append((request.content.digest, index))
                crc32, data = cut(known[request.content.digest], request.content, index)
                letter = m.BlobChunk(
                    digest=request.content.digest, index=index, crc32=crc32, data=data
                )
                desk.hear(letter)
    return asked


def installed(desk):
    return [fact.release.serial for fact in desk.facts if isinstance(fact, ReleaseKept)]


def test_a_release_is_fetched_kept_and_not_fetched_again():
    """A device that infers pulls a new release once; the next boot remembers it."""
    release = release_of(1)
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release)
    serve(desk, onnx_of(1))
    (kept,) = [fact for fact in desk.facts if isinstance(fact, ReleaseKept)]
    assert kept.data == onnx_of(1)
    assert desk.held.parts == {}

    again = Desk(desk.held, capability=INFERS).boot().meet()
    again.hear(release)

    assert again.take(m.BlobRequest) == []
    assert again.take(m.Birth)[0].release == release.content.digest


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_the_releases_of_two_runs_the_newest_is_installed_once(order):
    """Whatever order retained releases arrive in, at every reconnect, the newest one stays."""
    desk, taken = Desk(capability=INFERS).boot().meet(), []
    for _ in range(3):
        for serial in order:
            desk.hear(release_of(serial, run=f"run {serial}"))
        serve(desk, onnx_of(1), onnx_of(2))
        taken += installed(desk)
        desk = Desk(desk.held, capability=INFERS).boot().meet()

    assert taken == [2]
    assert desk.held.parts == {}


def test_the_model_in_use_released_again_is_not_fetched():
    """A newer release of the same bytes costs nothing and calls off what it supersedes."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))
    serve(desk, onnx_of(1))
    desk.hear(release_of(2))
    desk.take(m.BlobRequest)

    desk.hear(release_of(4, model=1))
    desk.hear(release_of(3))
    desk.now += 1000.0
    desk.wake()

    assert desk.take(m.BlobRequest) == []
    assert installed(desk) == [1]


def test_a_download_goes_on_when_the_same_content_is_released_again():
    """A newer release of the bytes under way is installed without asking for them twice."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))

    desk.hear(release_of(2, model=1))
    asked = serve(desk, onnx_of(1))

    assert len(asked) == len(set(asked)) == release_of(1).content.chunks
    assert installed(desk) == [2]


def test_a_release_that_was_gone_is_fetched_when_it_is_offered_again():
    """A farewell to a wanted release does not make the device deaf to it."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))
    desk.take(m.BlobRequest)
    desk.hear(m.BlobGone(digest=release_of(1).content.digest, reason="not yet"))

    desk.hear(release_of(1))
    serve(desk, onnx_of(1))

    assert installed(desk) == [1]


def test_a_release_of_an_impossible_content_is_ignored():
    """A release that cannot be fetched takes nothing from the one under way."""
    desk = Desk(capability=INFERS).boot().meet()
    desk.hear(release_of(1))
    content = m.Content(digest="zz", size=9, chunk_bytes=9)

    desk.hear(m.Release(run="run", round=9, content=content, serial=9))
    serve(desk, onnx_of(1))

    assert installed(desk) == [1]


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("chunks", [1, CONTENT.chunks])
def test_the_next_assignment_from_the_same_base_fetches_only_what_is_missing(chunks, restarts):
    """What was fetched of a base outlives a cancel, until another base is assigned."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    desk.take(m.BlobRequest)
    for index in range(chunks):
        crc32, data = cut(BASE, CONTENT, index)
        desk.hear(m.BlobChunk(digest=CONTENT.digest, index=index, crc32=crc32, data=data))
    desk.hear(m.Cancel(attempt=ATTEMPT, reason="too few came"))
    desk.take(m.BlobRequest)
    desk.now += 1000.0
    desk.wake()
    assert desk.take(m.BlobRequest) == []
    if restarts:
        desk = Desk(desk.held).boot().meet()

    desk.hear(assignment("run_4_dev"))
    asked = serve(desk, BASE)

    assert {index for _, index in asked} == set(range(chunks, CONTENT.chunks))
    assert (desk.trains[-1].assignment.attempt, desk.trains[-1].base) == ("run_4_dev", BASE)

    other = content_of(b"another base" * 5000, 16 * 1024)
    desk.hear(assignment("run_5_dev", base=other))
    assert desk.held.parts == {}
