"""How alike two responses are: sentence encoders whose cosine BDHS's semantic check compares (Sec. 3.4.3)."""
import torch
from torch.nn import functional as F


class OwnEmbeddings:
    """A sentence encoder made of the policy's own token embeddings: soft overlap of neighbouring word pairs.

    Each token is its embedding less the table's mean, at length 1; each pair of neighbours (the text's ends included) is the
    product of the first, rolled by one place, and the second, again at length 1, so that order counts; a text is the sum over
    its different pairs. A mean of single embeddings calls a caption with one wrong word the same, this does not.
    """
    name = "own embeddings (pairs)"

    def __init__(self, model, tokenizer):
        table = model.language_model.embed_tokens.weight.detach().float()
        self.table = F.normalize(table - table.mean(0), dim=-1)
        self.tokenizer, self.end = tokenizer, tokenizer.eos

    def embed(self, text):
        """(D,) fp32 unit vector of a text."""
        ids = [self.end, *self.tokenizer.encode(text), self.end]
        first, second = torch.tensor(sorted(set(zip(ids, ids[1:]))), device=self.table.device).T
        pairs = F.normalize(self.table[first].roll(1, -1) * self.table[second], dim=-1)  # (pairs, D)
        return F.normalize(pairs.sum(0), dim=-1)

    def cosine(self, a, b):
        """Cosine of two texts, from -1 to 1."""
        return float(self.embed(a) @ self.embed(b))
