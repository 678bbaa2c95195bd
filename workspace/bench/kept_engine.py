# SPDX-License-Identifier: Apache-2.0
"""One engine for all rounds: what takes the place of the class `vllm.LLM`."""

from collections.abc import Callable
from typing import Any


class KeptEngine:
    """Builds one engine, and returns the same one from then on.

    Its `generate` counts the tokens of every request. It also folds token ids into the vocabulary,
    because vLLM's latency benchmark draws ids below 10000 for any model.

    Args:
        llm_class: `vllm.LLM`.
        built: called once the engine is built.
    """

    def __init__(self, llm_class: Any, built: Callable[[], None] = lambda: None) -> None:
        self._class = llm_class
        self._built = built
        self._llm: Any = None
        self.prompt_tokens = 0
        self.output_tokens = 0

    def from_engine_args(self, engine_args: Any) -> Any:
        return self._keep(lambda: self._class.from_engine_args(engine_args))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._keep(lambda: self._class(*args, **kwargs))

    def _keep(self, build: Callable[[], Any]) -> Any:
        if self._llm is None:
            self._llm = build()
            vocab = self._llm.llm_engine.model_config.get_vocab_size()
            original = self._llm.generate

            def generate(prompts: Any, *args: Any, **kwargs: Any) -> Any:
                for prompt in prompts:
                    if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
                        ids = prompt["prompt_token_ids"]
                        if max(ids) >= vocab:
                            prompt["prompt_token_ids"] = [i % vocab for i in ids]
                outputs = original(prompts, *args, **kwargs)
                self.prompt_tokens += sum(len(o.prompt_token_ids or ()) for o in outputs)
                self.output_tokens += sum(len(c.token_ids) for o in outputs for c in o.outputs)
                return outputs

            self._llm.generate = generate
            self._built()
        return self._llm

    @property
    def llm(self) -> Any:
        if self._llm is None:
            raise RuntimeError("vLLM's benchmark did not build its engine through vllm.LLM")
        return self._llm
