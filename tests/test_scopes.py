"""What hangs on a model acts in its own passes, in its own thread, and comes off whatever interrupts it."""

import _thread
import asyncio
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from persona_lens.activations.means import attached_projections, mean_activations
from persona_lens.chat.batches import ChatTokens, collate
from persona_lens.interventions.hooks import attachments, steer
from persona_lens.models.adapters import adapted
from persona_lens.models.forward import forward
from persona_lens.models.scopes import Hook, hooked
from persona_lens.models.structure import suspended
from persona_lens.monitoring.live import stream_watched
from tests import tiny
from tests.finetuning_cases import random_adapter
from tests.interrupted_run import Interrupter
from tests.intervention_cases import TOKENS, logits, some_vectors

ROWS = [ChatTokens(tuple(range(5, 5 + n)), tuple(range(40, 40 + m))) for n, m in [(6, 4), (3, 9), (8, 2)]]


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# --- threads -------------------------------------------------------------------------------------------------------


def check_two_threads(model, rounds):
    """Two threads do each kind of work over and over, in another order each, and compare with what it gives alone."""
    vector = some_vectors(model).at(1)
    other = [ChatTokens(tuple(range(9, 40)), tuple(range(70, 75)))]

    def steered():
        with steer(model, vector, 3.0):
            return logits(model)

    def streamed():
        return [token.token for token in stream_watched(model, [7, 9, 40], vector, max_new_tokens=3)]

    work = [
        lambda: mean_activations(model, collate(ROWS)),
        lambda: mean_activations(model, collate(other)),
        steered,
        lambda: logits(model),
        lambda: read_projections(model, vector),
        streamed,
    ]
    expected = [torch.as_tensor(each()) for each in work]
    barrier, wrong = threading.Barrier(2), []

    def run(order):
        barrier.wait()
        for index in order * rounds:
            try:
                equal = torch.equal(torch.as_tensor(work[index]()), expected[index])
            except Exception as error:
                wrong.append((index, repr(error)))
            else:
                wrong.extend([] if equal else [(index, "another result")])

    threads = [threading.Thread(target=run, args=(order,)) for order in ([0, 2, 3, 4, 1, 5], [3, 5, 1, 4, 0, 2])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("rounds", [6, pytest.param(150, marks=pytest.mark.soak)])
def test_two_threads_on_one_model_each_get_what_they_would_get_alone(tiny_model, rounds):
    check_two_threads(tiny_model, rounds)


@pytest.mark.embedded
def test_two_threads_on_the_embedded_model_each_get_what_they_would_get_alone(embedded_bridge):
    check_two_threads(embedded_bridge, rounds=1)


def test_an_adapter_acts_in_the_thread_that_put_it_on_alone(tiny_bridge):
    adapter, plain = random_adapter(tiny_bridge), logits(tiny_bridge)
    rows = collate(ROWS)
    means = mean_activations(tiny_bridge, rows)
    with adapted(tiny_bridge, adapter):
        assert torch.equal(in_thread(lambda: logits(tiny_bridge)), plain)
        assert torch.equal(in_thread(lambda: mean_activations(tiny_bridge, rows)), means)
        assert not torch.equal(logits(tiny_bridge), plain)
        assert not torch.equal(mean_activations(tiny_bridge, rows), means)


def read_projections(model, vector):
    with attached_projections(model, [vector]) as found:
        forward(model, TOKENS, torch.ones_like(TOKENS).bool())
        return found.read()


def test_a_pass_of_another_thread_goes_through_unread_and_unsteered_and_is_an_error_if_it_is_the_only_one(tiny_model):
    plain, seen, vector = logits(tiny_model), [], some_vectors(tiny_model).at(1)
    note = Hook(tiny_model.blocks[1], lambda *_: seen.append(threading.get_ident()))
    with steer(tiny_model, vector, 3.0), hooked(tiny_model, [note]):
        assert torch.equal(in_thread(lambda: logits(tiny_model)), plain)
        assert not seen
        assert in_thread(lambda: attachments(tiny_model)) == ()
        assert not torch.equal(logits(tiny_model), plain)
    assert set(seen) == {threading.get_ident()}
    with (
        pytest.raises(RuntimeError, match="the model ran only in threads that began meanwhile"),
        steer(tiny_model, vector, 3.0),
    ):
        in_thread(lambda: logits(tiny_model))


class Interleaved(list):
    """A list into which another thread puts something while it is read."""

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile = meanwhile

    def __iter__(self):
        yield from list(super().__iter__())
        self.extend(self.meanwhile)
        self.meanwhile = []


def test_an_intervention_that_another_thread_attaches_meanwhile_is_not_lost(tiny_model, monkeypatch):
    from persona_lens.interventions import hooks as attachment

    other = SimpleNamespace(scope=SimpleNamespace(is_open=True))
    listed = Interleaved([other])
    monkeypatch.setitem(attachment._attached, tiny_model, listed)
    with steer(tiny_model, some_vectors(tiny_model).at(1), 3.0):
        assert other in listed


def test_a_context_handed_to_another_thread_acts_there(tiny_model):
    async def main():
        with steer(tiny_model, some_vectors(tiny_model).at(1), 3.0):
            return await asyncio.to_thread(logits, tiny_model), logits(tiny_model)

    there, here = asyncio.run(main())
    assert torch.equal(there, here)
    assert not torch.equal(there, logits(tiny_model))


def test_a_task_is_not_steered_by_the_context_that_another_one_waits_in(tiny_model):
    plain = logits(tiny_model)

    async def steered(entered, done):
        with steer(tiny_model, some_vectors(tiny_model).at(1), 3.0):
            entered.set()
            await done.wait()
            return logits(tiny_model)

    async def main():
        entered, done = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(steered(entered, done))
        await entered.wait()
        found = logits(tiny_model)
        done.set()
        return found, await other

    here, there = asyncio.run(main())
    assert torch.equal(here, plain)
    assert not torch.equal(there, plain)


def test_a_context_entered_by_hand_in_one_task_acts_in_the_next_as_cells_of_a_notebook_do(tiny_model):
    context = steer(tiny_model, some_vectors(tiny_model).at(1), 3.0)

    async def enter():
        context.__enter__()

    async def run():
        return logits(tiny_model)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(enter())
    found = loop.run_until_complete(run())
    loop.close()
    context.__exit__(None, None, None)
    assert not torch.equal(found, logits(tiny_model))


def test_a_context_left_open_by_a_thread_that_ended_acts_in_no_other(tiny_model):
    plain = logits(tiny_model)
    context = steer(tiny_model, some_vectors(tiny_model).at(1), 3.0)
    in_thread(context.__enter__)
    # Numbers of threads are given out again as soon as one has ended.
    found = [in_thread(lambda: logits(tiny_model)) for _ in range(10)]
    context.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert all(torch.equal(one, plain) for one in found)


def test_a_thread_that_was_there_before_may_run_the_model_while_an_intervention_is_open(tiny_model):
    plain, ready, done = logits(tiny_model), threading.Event(), threading.Event()

    def run_later():
        ready.wait(60)
        found = logits(tiny_model)
        done.set()
        return found

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_later)
        with steer(tiny_model, some_vectors(tiny_model).at(1), 3.0):
            ready.set()
            assert done.wait(60)
        assert torch.equal(running.result(), plain)


def test_a_pass_that_autograd_runs_again_in_its_own_thread_is_steered(tiny_bridge, monkeypatch):
    """On an accelerator, checkpointed activations are computed again in threads that Python did not start."""
    found, done = [], threading.Event()

    def recompute():
        found.append(logits(tiny_bridge))
        done.set()

    with steer(tiny_bridge, some_vectors(tiny_bridge).at(1), 3.0):
        expected = logits(tiny_bridge)
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 7)
        _thread.start_new_thread(recompute, ())
        assert done.wait(60)
    assert torch.equal(found[0], expected)


# --- copies --------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_model_with_an_adapter_keeps_it_with_its_own_weights_and_merging_is_refused(make_tiny_model):
    bridge = make_tiny_model("TransformerBridge")
    plain = logits(bridge)
    with adapted(bridge, random_adapter(bridge)) as carrier:
        expected = logits(bridge)
        copied, emptied = copy.deepcopy(bridge), copy.deepcopy(bridge)
        for merge in (carrier.merge_adapter, carrier.merge_and_unload):
            with pytest.raises(RuntimeError, match="change the model's own weights for good"):
                merge()
    with torch.no_grad():
        for name, weight in emptied.original_model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert torch.equal(logits(copied), expected)
    torch.testing.assert_close(logits(emptied), plain)
    assert torch.equal(logits(bridge), plain)


# --- suspension ----------------------------------------------------------------------------------------------------


def test_a_hook_of_pytorchs_own_is_silent_while_a_judge_scores_and_one_on_all_modules_is_refused(tiny_model):
    plain = logits(tiny_model)
    inner = tiny_model.original_model if hasattr(tiny_model, "original_model") else tiny_model
    module = next(child for name, child in inner.named_modules() if name.endswith("mlp"))
    handles = [
        module.register_forward_hook(lambda _module, _inputs, out: out * 3),
        module.register_forward_pre_hook(lambda _module, given: (given[0] * 2, *given[1:])),
    ]
    try:
        hooked_logits = logits(tiny_model)
        assert not torch.equal(hooked_logits, plain)
        with suspended(tiny_model):
            assert torch.equal(logits(tiny_model), plain)
        assert torch.equal(logits(tiny_model), hooked_logits)
        handles.append(torch.nn.modules.module.register_module_forward_hook(lambda *_: None))
        with pytest.raises(ValueError, match="hook on all modules"), suspended(tiny_model):
            pass
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(logits(tiny_model), plain)


def test_a_steer_entered_inside_a_suspension_acts_after_it_ends(tiny_model):
    vector = some_vectors(tiny_model).at(1)
    with steer(tiny_model, vector, 3.0):
        expected = logits(tiny_model)
    with ExitStack() as steering:
        with suspended(tiny_model):
            steering.enter_context(steer(tiny_model, vector, 3.0))
            assert torch.equal(logits(tiny_model), expected)
        assert torch.equal(logits(tiny_model), expected)
        assert len(attachments(tiny_model)) == 1
    assert not torch.equal(logits(tiny_model), expected)


def test_a_suspension_in_one_thread_leaves_the_steering_of_another(tiny_model):
    vector, plain = some_vectors(tiny_model).at(1), logits(tiny_model)
    with steer(tiny_model, vector, 3.0):
        expected = logits(tiny_model)
    inside, done = threading.Event(), threading.Event()

    def judge():
        with suspended(tiny_model):
            inside.set()
            done.wait(60)
            return logits(tiny_model)

    with ThreadPoolExecutor(1) as pool, steer(tiny_model, vector, 3.0):
        judging = pool.submit(judge)
        inside.wait(60)
        found = logits(tiny_model)
        done.set()
        judged = judging.result()
        assert torch.equal(found, expected)
        assert torch.equal(judged, plain)


def test_suspensions_of_two_threads_that_end_in_the_order_they_began_leave_no_gate(tiny_model):
    before = tiny.hook_counts(tiny_model)
    handle = tiny_model.blocks[0].register_forward_hook(lambda *_: None)
    inside, done = threading.Event(), threading.Event()

    def hold():
        with suspended(tiny_model):
            inside.set()
            done.wait(60)

    with ThreadPoolExecutor(1) as pool, ExitStack() as first:
        first.enter_context(suspended(tiny_model))
        second = pool.submit(hold)
        inside.wait(60)
        first.close()
        done.set()
        second.result()
    kept = list(tiny_model.blocks[0]._forward_hooks.values())
    assert [type(hook).__name__ for hook in kept] == ["function"]
    handle.remove()
    assert tiny.hook_counts(tiny_model) == before


# --- interrupts ----------------------------------------------------------------------------------------------------


def use(model, vector):
    with steer(model, vector, 2.0), attached_projections(model, [vector]) as found, suspended(model):
        forward(model, TOKENS[:1], torch.ones_like(TOKENS[:1]).bool())
    with steer(model, vector, 2.0, at="response", prompt_lengths=[3]), hooked(model, []):
        forward(model, TOKENS[:1], torch.ones_like(TOKENS[:1]).bool(), stop_after=2)
    return found


def test_an_interrupt_at_any_line_of_attaching_and_detaching_leaves_nothing(fresh_tiny_model):
    model = fresh_tiny_model
    vector = some_vectors(model).at(1)
    use(model, vector)
    whole = Interrupter()
    whole.run(lambda: use(model, vector))
    before, plain = tiny.hook_counts(model), logits(model)
    left = []
    gc.collect()
    gc.freeze()
    for at in range(1, whole.lines, max(1, whole.lines // 100)):
        Interrupter(at).run(lambda: use(model, vector))
        gc.collect()  # frames under executed annotations refer to each other
        acting = not torch.equal(logits(model), plain)
        forward(model, TOKENS[:1], torch.ones_like(TOKENS[:1]).bool())  # whoever uses it next repairs it
        if acting or tiny.hook_counts(model) != before:
            left.append(at)
    gc.unfreeze()
    assert left == []


@pytest.mark.filterwarnings("ignore:Exception ignored in. <finalize")
def test_what_an_interrupted_closing_left_acts_no_more_and_goes_with_the_next_use(fresh_tiny_model, monkeypatch):
    from persona_lens.models import scopes

    model = fresh_tiny_model
    vector, plain = some_vectors(model).at(1), logits(fresh_tiny_model)
    before = tiny.hook_counts(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    context = steer(model, vector, 3.0)
    context.__enter__()
    assert not torch.equal(logits(model), plain)
    tables = scopes._hook_tables
    monkeypatch.setattr(scopes, "_hook_tables", interrupt)  # again and again
    with pytest.raises(KeyboardInterrupt):
        context.__exit__(None, None, None)
    monkeypatch.setattr(scopes, "_hook_tables", tables)
    assert tiny.hook_counts(model) != before, "the interrupts came before anything was taken off"
    assert torch.equal(logits(model), plain), "what is closing does not act"
    forward(model, TOKENS, torch.ones_like(TOKENS).bool())
    assert tiny.hook_counts(model) == before
