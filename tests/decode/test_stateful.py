"""A decoder with a state, an LSTM of icefall's older recipes, is searched as well."""

import pytest
import torch
from torch import nn

from icefall_kd.decode import GreedySearch


class Lstm(nn.Module):
    """As in icefall's recipe `transducer`."""

    blank_id = 0

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 10)
        self.rnn = nn.LSTM(10, 10, batch_first=True)

    def forward(self, y, states=None):
        return self.rnn(self.embedding(y), states)


class Joiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.output_linear = nn.Linear(10, 7)

    def forward(self, encoder_out, decoder_out):
        x = encoder_out.unsqueeze(2) + decoder_out.unsqueeze(1)
        return self.output_linear(torch.tanh(x))


class ProjectingJoiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_proj, self.decoder_proj = nn.Linear(10, 9), nn.Linear(10, 9)
        self.output_linear = nn.Linear(9, 7)

    def forward(self, encoder_out, decoder_out):
        assert encoder_out.dim() == decoder_out.dim() == 4
        x = self.encoder_proj(encoder_out) + self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(x))


@pytest.fixture(params=[Joiner, ProjectingJoiner])
def model(request):
    model = nn.Module()
    model.decoder, model.joiner = Lstm(), request.param()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return model.eval()


def icefalls(model, x, max_sym):
    """icefall's transducer/beam_search.py, greedy_search, with another limit."""
    hyp, frames, t, at_frame = [], [], 0, 0
    out, state = model.decoder(torch.tensor([[0]]))
    while t < len(x):
        frame = x[None, t : t + 1]
        if hasattr(model.joiner, "encoder_proj"):
            logits = model.joiner(frame.unsqueeze(2), out.unsqueeze(1))
        else:
            logits = model.joiner(frame, out)
        y = int(logits.argmax())
        if y:
            hyp.append(y)
            frames.append(t)
            out, state = model.decoder(torch.tensor([[y]]), state)
            at_frame += 1
        if not y or at_frame >= max_sym:
            at_frame, t = 0, t + 1
    return hyp, frames


@pytest.mark.parametrize("max_sym", [None, 1, 4])
def test_it_equals_icefalls_loop_whole_and_in_chunks(model, max_sym):
    search = GreedySearch(model, max_sym)
    x, lens = 2 * torch.randn(3, 31, 10), torch.tensor([31, 20, 0])
    result = search(x, lens)
    assert "without tables" in result.report.way
    expected = [icefalls(model, r[:n], max_sym or 1) for r, n in zip(x, lens.tolist())]
    assert [(h.tokens, h.frames) for h in result.hypotheses] == expected
    assert 3 < len(expected[0][0]) and len(set(expected[0][0])) > 1
    states, found = None, [([], []) for _ in expected]
    while x.size(1):
        part = search(x[:, :7], lens.clamp(max=min(7, x.size(1))), states)
        again = search(x[:, :7], lens.clamp(max=min(7, x.size(1))), states)
        assert part.hypotheses == again.hypotheses  # the states stay as they are
        x, lens, states = x[:, 7:], (lens - 7).clamp(min=0), part.states
        for (tokens, frames), new in zip(found, part.hypotheses):
            tokens += new.tokens
            frames += new.frames
    assert found == expected
