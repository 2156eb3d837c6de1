"""Small transducer heads, alone, and what an encoder might give them."""

import pytest
import torch
from torch import nn

WIDTH = 12  # of the encoder output


class Head(nn.Module):
    """Decoder, joiner and CTC head of the package zipformer, with random weights."""

    def __init__(self, vocab=11, context=2, blank_id=0, unk_id=None, seed=0, rate=0.3):
        super().__init__()
        from zipformer.modules.model import Decoder, Joiner

        torch.manual_seed(seed)
        self.decoder = Decoder(vocab, 16, blank_id, context)
        self.joiner = Joiner(WIDTH, 16, 20, vocab)
        self.ctc_output = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(WIDTH, vocab), nn.LogSoftmax(-1)
        )
        if unk_id is not None:
            self.unk_id = unk_id
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.2 * torch.randn_like(p))
            # As much bias for blank as lets about `rate` of the frames have a token.
            x = self.joiner.encoder_proj(heard(64, seed=seed))
            row = self.decoder(torch.tensor([[blank_id] * context]), need_pad=False)
            row = self.joiner.decoder_proj(row).expand(64, 1, -1)[:, 0]
            logits = self.joiner(x, row, project_input=False)
            ahead = logits.amax(-1) - logits[:, blank_id]
            self.joiner.output_linear.bias[blank_id] += ahead.quantile(1 - rate)
        self.eval()


def heard(*size, seed=0):
    """Frames that differ much."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(*size, WIDTH, generator=generator)


@pytest.fixture(scope="session")
def make_head():
    return Head


@pytest.fixture(scope="session")
def make_batch():
    """Encoder output of N utterances, padded with numbers that may not matter."""

    def make(n, longest, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lens = torch.randint(1, longest + 1, (n,), generator=generator)
        return heard(n, int(lens.max()) + seed % 3, seed=seed), lens

    return make
