"""The faster products and the joiner by sigmoid give the joiner's own logits."""

import pytest
import torch
from zipformer.decode.search import greedy_search

from icefall_kd.decode import GreedySearch, products
from icefall_kd.decode.batch import MAX_WINDOW, Batch
from icefall_kd.decode.transducer import Transducer


@pytest.fixture(params=[0, 2**60], ids=["packed", "PyTorch's own"])
def way(request, monkeypatch):
    """All products take one of both ways, where PyTorch has the first."""
    monkeypatch.setattr(products, "PACKED_FROM", request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_products_equal_those_in_float64(way, rows):
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(n, 37, generator=generator) for n in (53, rows))
    bias = torch.randn(53, generator=generator)
    expected = (x.double() @ weight.double().t() + bias).float()
    product = products.Product(weight, bias)
    assert torch.allclose(product(x), expected, atol=1e-4)
    assert torch.allclose(product(x[None, :, None]), expected[None, :, None], atol=1e-4)
    assert not torch.allclose(product(x), expected - bias, atol=1e-4)


def test_small_products_are_pytorchs_own():
    weight, x = torch.ones(8, 8), torch.ones(2, 8)
    product = products.Product(weight, torch.ones(8))
    product.packed = "not to be used"
    assert torch.equal(product(x), torch.full((2, 8), 9.0))


def test_without_packed_matrices_products_are_pytorchs_own(monkeypatch):
    """Float64 has none, and neither has a PyTorch without oneDNN."""
    assert (
        products.Product(torch.ones(8, 8).double(), torch.ones(8).double()).packed
        is None
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products.Product(torch.ones(8, 8), torch.ones(8)).packed is None


def test_a_pytorch_whose_packed_product_has_changed_takes_its_own(monkeypatch):
    def changed(x, packed, bias):
        raise RuntimeError("_linear_pointwise() expected at most 2 arguments")

    monkeypatch.setattr(products, "_packed_product", changed)
    monkeypatch.setattr(products, "PACKED_FROM", 0)
    product = products.Product(torch.ones(8, 8), torch.ones(8))
    assert torch.equal(product(torch.ones(2, 8)), torch.full((2, 8), 9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_the_joiners(make_head, way, dtype):
    head = make_head(vocab=31).to(dtype)
    transducer = Transducer(head)
    assert transducer.plain_joiner
    generator = torch.Generator().manual_seed(1)
    x = 4 * torch.randn(29, 12, generator=generator).to(dtype)
    contexts = torch.randint(-1, 31, (29, 2), generator=generator)
    rows = head.decoder(contexts, need_pad=False)[:, 0]
    expected = head.joiner(x[:, None, None], rows[:, None, None])[:, 0, 0]
    found = transducer.logits(
        transducer.project(x),
        transducer.decoder_rows([tuple(c) for c in contexts.tolist()]),
        0.0,
    )
    # A number may be missing from all logits of a row: blank's.
    assert (found[:, head.decoder.blank_id] == 0).all()
    found, expected = found.log_softmax(-1), expected.log_softmax(-1)
    rounding = 1e-4 if dtype is torch.float32 else 1e-9
    assert torch.allclose(found, expected, atol=rounding)
    numbers = (contexts[:, 0] + 1) * transducer.base + contexts[:, 1] + 1
    by_number = transducer.rows_of_numbers(numbers)
    assert torch.equal(
        by_number, transducer.decoder_rows([tuple(c) for c in contexts.tolist()])
    )


def test_a_joiner_in_half_precision_is_called_itself(make_head):
    """Its sums of sigmoids would lose what sums of tanh keep."""
    transducer = Transducer(make_head().to(torch.bfloat16))
    assert not transducer.plain_joiner


@pytest.mark.parametrize("blank_id, unk_id", [(0, None), (4, None), (0, 3)])
def test_leads_of_the_best_emitted_token(make_head, blank_id, unk_id):
    transducer = Transducer(make_head(blank_id=blank_id, unk_id=unk_id))
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(50, 12, generator=generator)
    silent = sorted({blank_id, blank_id if unk_id is None else unk_id})
    emitted = [k for k in range(11) if k not in silent]
    rows = transducer.decoder_rows([transducer.start])
    for penalty in (0.0, 1.5):
        logits = transducer.logits(transducer.project(x), rows, penalty)
        before = logits.clone()
        expected = logits[:, emitted].amax(1) - logits[:, silent].amax(1)
        assert torch.equal(transducer.leads(logits, penalty), expected)
        assert torch.equal(logits, before)
        logits[7, emitted[0]] = float("nan")
        assert transducer.leads(logits, penalty)[7].isnan()


def test_windows_may_end_behind_the_last_frame(make_head, make_batch):
    encoder_out, lens = make_batch(3, 9)
    batch = Batch(Transducer(make_head()), encoder_out, lens)
    last = len(batch.frames) - 1
    for places in ([last], [0, last], [2, last, 1]):
        windows = batch.windows(places, MAX_WINDOW)
        assert windows.shape[:2] == (len(places), MAX_WINDOW)
        for window, place in zip(windows, places):
            expected = batch.frames[place : place + MAX_WINDOW]
            assert torch.equal(window[: len(expected)], expected)


@pytest.mark.parametrize("draft", ["none", "ctc"])
def test_tokens_and_frames_are_icefalls_by_either_way(
    make_head, make_batch, way, draft
):
    for seed in range(6):
        head = make_head(vocab=500, context=seed % 3 + 1, seed=seed)
        encoder_out, lens = make_batch(9, 50, seed)
        encoder_out = encoder_out[:, : int(lens.max())]
        result = GreedySearch(head, draft=draft)(encoder_out, lens)
        with torch.no_grad():
            expected = greedy_search(head, encoder_out, lens, return_timestamps=True)
        found = [(h.tokens, h.frames) for h in result.hypotheses]
        assert found == list(zip(expected.hyps, expected.timestamps))
