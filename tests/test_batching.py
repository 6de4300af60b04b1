"""What a user of continuous batching relies on: answers as alone, nothing lost, nothing kept."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged import TEXT, check_books, model  # noqa: F401

from llama_edu import generate
from llama_edu.generation import ContinuousBatcher


def alone(model, prompt, **options):  # noqa: F811
    return generate(model, [prompt], **options)[0]


def free(batcher):
    check_books(batcher.cache)
    return batcher.cache.pool.n_free


REQUEST = st.fixed_dictionaries(
    {
        "arrives": st.integers(0, 6),
        "prompt": st.tuples(st.sampled_from([0, 0, 20]), st.integers(1, 12)).map(lambda x: TEXT[x[0] : x[0] + x[1]]),
        "max_new_tokens": st.integers(0, 9),
        "temperature": st.sampled_from([0.0, 0.0, 1.2]),
        "seed": st.integers(0, 5),
        "stop_ids": st.sets(st.integers(0, 63), max_size=10),
    }
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    schedule=st.lists(REQUEST, min_size=1, max_size=8),
    block_size=st.integers(1, 5),
    spare=st.integers(0, 12),
    max_batch=st.integers(1, 5),
    read_at_once=st.none() | st.integers(1, 4),
    share=st.booleans(),
    together=st.sampled_from([0, 8, 64]),
)
def test_every_answer_is_the_one_alone_whatever_the_schedule(
    model, schedule, block_size, spare, max_batch, read_at_once, share, together  # noqa: F811
):  # fmt: skip
    blocks = -(-20 // block_size) + spare  # the longest request, and a little more
    options = dict(max_batch=max_batch, read_at_once=read_at_once, share=share, together=together)
    batcher = ContinuousBatcher(model, n_blocks=blocks, block_size=block_size, **options)
    schedule = sorted(schedule, key=lambda r: r["arrives"])
    options = [{k: v for k, v in r.items() if k not in ("arrives", "prompt")} for r in schedule]
    came: dict[int, list[int]] = {n: [] for n in range(len(schedule))}
    step = submitted = 0
    while submitted < len(schedule) or batcher.open:
        while submitted < len(schedule) and schedule[submitted]["arrives"] <= step:
            assert batcher.submit(schedule[submitted]["prompt"], **options[submitted]) == submitted
            submitted += 1
        for number, token in batcher.step():
            came[number].append(token)
        check_books(batcher.cache)
        assert len(batcher._running) <= max_batch
        step += 1
        assert step < 400
    for number, request in enumerate(schedule):
        expected = alone(model, request["prompt"], **options[number])
        assert came[number] == batcher.requests[number].new == expected
        assert batcher.requests[number].state == "done"
    assert free(batcher) == blocks


def test_requests_join_a_running_batch_and_leave_it(model):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=40, block_size=4)
    a = batcher.submit(TEXT[:5], max_new_tokens=6)
    batcher.step()
    b = batcher.submit(TEXT[20:23], max_new_tokens=2)
    assert [n for n, _ in batcher.step()] == [a, b]
    assert [n for n, _ in batcher.step()] == [a, b]
    assert batcher.requests[b].ended and not batcher.requests[a].ended
    assert batcher.run() == {
        a: alone(model, TEXT[:5], max_new_tokens=6),
        b: alone(model, TEXT[20:23], max_new_tokens=2),
    }


def test_blocks_that_run_out_send_the_youngest_back(model):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=6, block_size=2)
    for start in (0, 20):
        batcher.submit(TEXT[start : start + 4], max_new_tokens=8)
    batcher.run()
    assert batcher.counts["preemptions"] >= 1
    assert batcher.requests[0].preempted == 0 and batcher.requests[1].preempted >= 1
    for number, start in enumerate((0, 20)):
        assert batcher.requests[number].new == alone(model, TEXT[start : start + 4], max_new_tokens=8)
    assert free(batcher) == 6


def test_a_request_waits_until_there_are_blocks_for_all_it_has_to_read(model):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=6, block_size=2)
    for start in (0, 20):
        batcher.submit(TEXT[start : start + 8], max_new_tokens=2)
    assert [n for n, _ in batcher.step()] == [0]
    batcher.run()
    assert batcher.counts["preemptions"] == 0


def test_one_may_be_sent_back_in_the_middle_of_its_prompt(model):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=7, block_size=2, read_at_once=2, together=0)
    prompts = [TEXT[:2], TEXT[20:22], TEXT[30:40]]
    for prompt, n in zip(prompts, (8, 8, 1)):
        batcher.submit(prompt, max_new_tokens=n)
    got = batcher.run()
    assert batcher.requests[2].preempted == 1
    assert [got[i] for i in range(3)] == [alone(model, p, max_new_tokens=n) for p, n in zip(prompts, (8, 8, 1))]
    assert free(batcher) == 7


def test_a_shared_beginning_is_read_once(model):  # noqa: F811
    counts = []
    for share in (True, False):
        batcher = ContinuousBatcher(model, n_blocks=40, block_size=4, share=share)
        batcher.submit([*TEXT[:16], 1], max_new_tokens=1)
        batcher.step()
        for i in range(3):
            batcher.submit([*TEXT[:16], 10 + i], max_new_tokens=2)
        batcher.run()
        counts.append((batcher.counts["read"], batcher.counts["shared"]))
    assert counts == [(17 + 3 * 2, 48), (17 + 3 * 18, 0)]


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(model):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=40, block_size=4, read_at_once=5)
    a = batcher.submit(TEXT[:3], max_new_tokens=8)
    batcher.step()
    b = batcher.submit(TEXT[20:37], max_new_tokens=2)
    came = [[n for n, _ in batcher.step()] for _ in range(4)]
    assert came == [[a], [a], [a], [a, b]]
    assert batcher.run()[b] == alone(model, TEXT[20:37], max_new_tokens=2)


def test_a_request_that_breaks_does_not_take_the_others_with_it(model):  # noqa: F811
    broken = copy.deepcopy(model)
    answers = [alone(model, TEXT[s : s + 4], max_new_tokens=6) for s in (0, 10, 20)]
    poison = next(i for i in answers[1] if i not in {*answers[0], *answers[2], *TEXT[:4], *TEXT[10:14], *TEXT[20:24]})
    broken.tok_embeddings.weight.data[poison] = torch.nan
    batcher = ContinuousBatcher(broken, n_blocks=20, block_size=4)
    for s in (0, 10, 20):
        batcher.submit(TEXT[s : s + 4], max_new_tokens=6)
    got = batcher.run()
    assert (got[0], got[2]) == (answers[0], answers[2])
    failed = batcher.requests[1]
    assert failed.state == "failed" and "begins at parameter tok_embeddings" in failed.error
    assert failed.new == answers[1][: answers[1].index(poison) + 1]
    assert free(batcher) == 20


def test_cancel(model):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=20, block_size=4, max_batch=1)
    a, b, c = (batcher.submit(TEXT[:4], max_new_tokens=6) for _ in range(3))
    batcher.step()
    batcher.cancel(a)
    batcher.cancel(c)
    got = batcher.run()
    batcher.cancel(b)
    assert got[a] == got[b][:1] and got[c] == [] and len(got[b]) == 6
    assert [batcher.requests[n].state for n in (a, b, c)] == ["cancelled", "done", "cancelled"]
    assert free(batcher) == 20


def test_a_caller_may_stop_in_the_middle(model):  # noqa: F811
    """An exception from the model or the choice leaves the books right, and the work can go on."""
    calls = []

    def choose(logits, rows, step, ids):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return logits.argmax(-1)

    batcher = ContinuousBatcher(model, n_blocks=20, block_size=4)
    a = batcher.submit(TEXT[:4], max_new_tokens=4, choose=choose)
    with pytest.raises(KeyboardInterrupt):
        batcher.run()
    check_books(batcher.cache)
    assert batcher.requests[a].new == alone(model, TEXT[:4], max_new_tokens=1)
    assert batcher.run() == {a: alone(model, TEXT[:4], max_new_tokens=4)}


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt 0 is empty"),
        ([64], {}, "id 64"),
        ([1] * 49, {}, "cut it by 1"),
        ([1] * 40, dict(max_new_tokens=9), "at most 8 new tokens"),
        ([1] * 16, {}, "request 0 needs room for 17 tokens; the cache has 4 blocks of 4"),
        ([1], dict(temperature=-1.0), "temperature is -1"),
        ([1], dict(top_k=2), "top_k means nothing"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(model, prompt, options, words):  # noqa: F811
    batcher = ContinuousBatcher(model, n_blocks=4, block_size=4)
    with pytest.raises(ValueError, match=words):
        batcher.submit(prompt, **{"max_new_tokens": 2, **options})
    assert batcher.open == 0 and batcher.requests == {}
    with pytest.raises(ValueError, match="at least 1"):
        ContinuousBatcher(model, n_blocks=4, max_batch=0)
