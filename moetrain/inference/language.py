"""The language of a bundle: text to the ids its model reads, ids back to text, and which ids end a text. No torch."""

from dataclasses import dataclass

from moetrain.base.errors import BundleError
from moetrain.store.bundle import Bundle
from moetrain.text.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Language:
    """`tokenizer` None: the bundle has none; its model still serves token ids."""

    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...]  # tokens that end a text

    @classmethod
    def of(cls, bundle: Bundle) -> "Language":
        """Raises DataError for a tokenizer.json that cannot be read."""
        facts = bundle.tokenizer_facts
        tokenizer = None
        if facts.type == "byte":
            tokenizer = Tokenizer.byte()
        elif bundle.tokenizer is not None:
            tokenizer = Tokenizer.load(bundle.tokenizer)
        known_end = () if tokenizer is None else (tokenizer.end_id,)
        return cls(tokenizer, tuple(facts.eos) or known_end)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt as the tokenizer's own template begins a text (Mixtral's begins with <s>, ours with nothing).

        An empty one is an end of document, behind which the next begins. BundleError without a tokenizer.
        """
        tokenizer = self._present()
        ids, marked = tokenizer.encode(prompt), tokenizer.core.encode(prompt, add_special_tokens=True).ids
        start = next((n for n in range(len(marked)) if marked[n : n + len(ids)] == ids), 0) if ids else len(marked)
        return marked[:start] + ids or [tokenizer.end_id]

    def stream(self) -> StreamDecoder:
        """A decoder for one completion. BundleError without a tokenizer."""
        return StreamDecoder(self._present())

    def _present(self) -> Tokenizer:
        if self.tokenizer is None:
            hint = "Import it again from a folder with tokenizer.json."
            raise BundleError("The bundle has no tokenizer, so it can serve token ids only.", hint)
        return self.tokenizer
