"""A conversation with one or two policies. One rank reads and writes; all compute."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import ChatConfig
from megatron_rlhf.data.chat.messages import Conversation, Message
from megatron_rlhf.data.chat.template import Chat
from megatron_rlhf.data.formats.record import Record
from megatron_rlhf.data.streaming import TextStream
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel import collectives
from megatron_rlhf.rollout.collect import sample_responses
from megatron_rlhf.rollout.types import Responses

COMMANDS = "/model a|b|ab, /best N, /seed N, /undo, /reset, /save FILE, /quit"
MICRO_BATCH_SIZE = 8


@dataclass
class ChatRoom:
    """The models, and what was said."""

    config: ChatConfig
    tokenizer: Tokenizer
    policies: Mapping[str, Role]
    """`a`, and `b` if there is another one."""
    reward: Role | None
    few_shot: str
    """Put before the first turn."""
    read: Callable[[], str | None]
    """The next line of the user's; None at the end. Called on the first rank."""
    write: Callable[[str], Any]
    messages: list[Message] = field(default_factory=list)
    shown: str = "a"
    """Names of the models that answer; the first one's answers are remembered."""
    best_of: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.best_of, self.seed = self.config.chat.best_of, self.config.run.seed
        self._reset()

    def run(self) -> None:
        """Until the user leaves. A mistake is told, and the conversation goes on."""
        self._say(f"{COMMANDS}\n")
        while (line := self._next_line()) is not None:
            try:
                if not line.startswith("/"):
                    self.answer(line)
                elif not self._command(*line[1:].split(maxsplit=1)):
                    return
            except UserError as error:
                self._say(f"{error}\n")

    def answer(self, text: str) -> None:
        """One turn of the user's, and the answers to it."""
        first = not any(message["role"] == "user" for message in self.messages)
        self.messages.append({"role": "user", "content": self.few_shot + text if first else text})
        try:
            prompt = self._prompt()
            answers = [self._answer(name, prompt) for name in self.shown]
        except UserError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answers[0]})

    def _answer(self, name: str, prompt: list[int]) -> str:
        policy, tokenizer, streams = (
            self.policies[name],
            self.tokenizer,
            self.best_of == self.config.sampling.beams == 1,
        )
        if len(prompt) + self.config.sampling.longest_response > policy.model.max_sequence_length:
            raise UserError(
                f"the conversation ({len(prompt)} tokens) and sampling.max_response_tokens="
                f"{self.config.sampling.longest_response} are more than the context of {policy.model.max_sequence_length} "
                "tokens: /undo or /reset, or a shorter limit"
            )
        self._say(f"{name}: " if len(self.policies) > 1 else "")
        stream = TextStream(tokenizer.continuation, skip_special_tokens=True)

        def listen(_: int, token: int) -> None:
            if streams:
                self._say(stream.step(token))

        turn = len(self.messages)
        completions = sample_responses(
            policy,
            [prompt] * self.best_of,
            [turn] * self.best_of,
            self.config.sampling,
            tokenizer.stop_ids,
            (self.seed, turn),
            tokenizer.stop_watch,
            listen,
        )
        texts = [tokenizer.decode(completion.tokens, continuation=True) for completion in completions]
        best, scores = 0, self._scores(prompt, completions)
        if scores is not None:
            best = max(range(len(scores)), key=scores.__getitem__)
        if not streams:
            self._say(texts[best])
        if scores is not None:
            self._say(f"  [{scores[best]:.3f}{f', best of {len(scores)}' if len(scores) > 1 else ''}]")
        self._say("\n")
        return texts[best]

    def _scores(self, prompt: list[int], completions: Any) -> list[float] | None:
        if self.reward is None:
            return None
        responses = Responses.pack(
            [prompt] * len(completions), completions, self.tokenizer.pad_id, collectives.device()
        )
        return self.reward.scores(responses.sequences, MICRO_BATCH_SIZE).tolist()

    def _prompt(self) -> list[int]:
        """Through the chat template; without one, the last turn is a text to go on from."""
        if self.tokenizer.hf.chat_template is None:
            return self.tokenizer.encode(str(self.messages[-1]["content"]), bos=True)
        conversation = Conversation(Record("this conversation", {}), tuple(self.messages))
        return self.tokenizer.encode(Chat(self.tokenizer).prompt_text(conversation))

    def _command(self, name: str = "", value: str = "") -> bool:
        """Carry out a command; False to leave."""
        match name:
            case "quit" | "exit":
                return False
            case "reset":
                self._reset()
            case "undo":
                while self.messages and self.messages.pop()["role"] != "user":
                    pass
            case "seed" | "best" if value.isdecimal():
                if name == "best" and int(value) > 1 and self.config.sampling.beams > 1:
                    raise UserError(f"/best {value}: sampling.beams={self.config.sampling.beams} has one best answer")
                if name == "best" and int(value) != 1 and (self.reward is None or int(value) < 1):
                    raise UserError("/best N needs reward.init_from, the model that chooses, and N from 1 on")
                setattr(self, {"seed": "seed", "best": "best_of"}[name], int(value))
            case "model" if value and set(value) <= self.policies.keys():
                self.shown = "".join(dict.fromkeys(value))
            case "save" if value:
                self._save(Path(value))
            case _:
                raise UserError(
                    f"/{name} {value}".rstrip() + f": there are {COMMANDS}, with models {', '.join(self.policies)}"
                )
        return True

    def _save(self, path: Path) -> None:
        """Add the conversation to a file of demonstrations."""
        if not any(message["role"] == "assistant" for message in self.messages):
            raise UserError(f"/save {path}: nothing was answered yet")
        if dist.get_rank() == 0:
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            except OSError as error:
                self._say(f"{path}: {error.strerror}\n")

    def _reset(self) -> None:
        system = self.config.chat.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _next_line(self) -> str | None:
        """The first rank's next line that is not blank, on every rank."""
        while True:
            line = [self.read() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(line)
            if line[0] is None or line[0].strip():
                return line[0]

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0 and text:
            self.write(text)
