"""When the answers of a request end, and how they begin: the template's rules, or compat's."""

import dataclasses

from minigpt4_jax import compat
from minigpt4_jax.answer import Answer
from minigpt4_jax.data.prompts import Template
from minigpt4_jax.data.tokens import Tokenizer
from minigpt4_jax.request import STOP_IDS, Request


@dataclasses.dataclass(frozen=True)
class Endings:
    """For all requests to one model."""

    tokenizer: Tokenizer
    template: Template

    @property
    def most_ids(self) -> int:
        """Tokens that can end the answers of one request, at most."""
        return len(self.tokenizer.eos_ids) + STOP_IDS

    def ids(self, request: Request) -> tuple[int, ...]:
        """Tokens that end its answers."""
        if request.compat:
            return compat.find_rules(self.template).end_ids
        return (*self.tokenizer.eos_ids, *request.sampling.stop_ids)

    def strings(self, request: Request) -> tuple[str, ...]:
        """Strings that end its answers; none where compat's rules do."""
        return () if request.compat else (*request.stop, *self.template.stop)

    def rules(self, request: Request) -> compat.Rules | None:
        """The original's, where a request wants those."""
        return compat.find_rules(self.template) if request.compat else None

    def first_id(self, request: Request) -> int | None:
        """A token that counts as generated before the first one; None: there is none."""
        rules = self.rules(request)
        return rules and rules.first_id

    def answer(self, request: Request) -> Answer:
        """The text of one of its answers, empty yet."""
        if request.compat:
            stops = compat.find_rules(self.template).stops
            return Answer(self.tokenizer, sequences=stops, whole=compat.said)
        starts = request.messages[-1].role == "user"
        return Answer(self.tokenizer, stop=self.strings(request), starts=starts)
