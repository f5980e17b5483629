"""Captions of training: their token ids, and a text encoder that is frozen or trained."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.training.context import Run
from cmdgen.training.randomness import Draws

# captions that a tokenizer learns from, in two phrasings
CAPTIONS = 10_000
# captions that whitening is measured on: of so many clips, in so many wordings; and its deviation,
# which makes up for a learning rate that suits the rest of the model
WHITENED, WORDINGS, GAIN = 4096, 4, 3.0


class Text:
    """The tokenizer and the text encoder of a run."""

    def __init__(self, run: Run, tokenizer: Tokenizer, encoder: ClipTextModel) -> None:
        self.data, self.device = run.data, run.device
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length = encoder.config.max_position_embeddings

    @classmethod
    def read(cls, run: Run) -> "Text":
        """Read the frozen text encoder of a former stage."""
        encoder = run.read("text_encoder")
        return cls(run, _read(run.finished("tokenizer"), encoder), encoder)

    @classmethod
    def build(cls, run: Run) -> "Text":
        """Build the text encoder that this stage trains.

        The tokenizer is the one that the stage began with, else that of `init`, else it is learned
        from the captions.
        """
        assert run.model.text is not None
        encoder: ClipTextModel = run.build("text_encoder")
        place, initial = run.folder / "tokenizer", run.initial("tokenizer")
        if place.is_dir() and not run.start.restart:
            return cls(run, _read(place, encoder), encoder)
        if initial is not None:
            tokenizer = _read(initial, encoder)
        else:
            indices = run.data.source.indices("train", CAPTIONS)
            texts = [text for variant in range(2) for text in run.data.captions(indices, variant)]
            tokenizer = Tokenizer.train(texts, run.model.text.vocab_size)
        # before the first checkpoint: token ids must never change under the weights
        shutil.rmtree(place, ignore_errors=True)
        tokenizer.save_pretrained(place, length=run.model.text.max_position_embeddings)
        return cls(run, tokenizer, encoder)

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.encoder(ids).last_hidden_state

    def ids(self, texts: list[str]) -> Tensor:
        """() -> (B, L) int64."""
        return self.tokenizer(texts, self.length).to(self.device)

    @torch.no_grad()
    def whitening(self) -> tuple[Tensor, Tensor]:
        """() -> (D), (D, D): the mean of the mean states of captions, and what makes them vary alike."""
        indices = self.data.training[:WHITENED]
        texts = [text for variant in range(WORDINGS) for text in self.data.captions(indices, variant)]
        states = torch.cat([self(self.ids(texts[i : i + 256])).mean(dim=1) for i in range(0, len(texts), 256)]).float()
        mean = states.mean(dim=0)
        _, deviations, directions = torch.linalg.svd((states - mean) / len(states) ** 0.5, full_matrices=False)
        # what hardly varies at all is noise
        scales = GAIN / (deviations.square() + (0.01 * deviations[0]).square()).sqrt()
        return mean, directions.mT * scales @ directions

    def draw(self, rows: Tensor, dropout: float, draws: Draws) -> Tensor:
        """(B,) -> (B, L) int64: captions in another phrasing each time, some left empty."""
        variant = int(torch.randint(1000, (), generator=draws.generator))
        texts = self.data.captions(self.data.training[rows], variant)
        dropped = (draws(torch.rand) < dropout).tolist()
        return self.ids(["" if drop else text for text, drop in zip(texts, dropped, strict=True)])


def _read(folder: Path, encoder: ClipTextModel) -> Tokenizer:
    return Tokenizer.from_pretrained(folder, vocab_size=encoder.config.vocab_size)
