"""A chat model behind an OpenAI-compatible endpoint: OpenAI, vLLM, SGLang, llama.cpp's server, ..."""

import os
import threading
from collections import Counter


class Chat:
    """Messages in, text out, tokens counted. Retries (connections, 408, 409, 429, 5xx) are the `openai` client's own.

    base_url: such as http://localhost:8000/v1; api_key: by default the environment's OPENAI_API_KEY, if any. Raises
    ValueError without the package openai, or for what is no URL. Safe in threads.
    """

    def __init__(self, base_url, model, api_key=None, temperature=0.0, max_tokens=4096, retries=5, timeout=600.0):
        if not str(base_url).startswith(("http://", "https://")):
            raise ValueError(
                f"{base_url!r} is no endpoint; one begins with http:// or https:// and ends with /v1, mostly"
            )
        if not model:
            raise ValueError(f"which model of {base_url}? Name it")
        try:
            from openai import OpenAI
        except ImportError:
            raise ValueError("an endpoint needs the package openai: pip install openai") from None
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"  # local servers ask for none
        self.client = OpenAI(base_url=base_url, api_key=key, max_retries=retries, timeout=timeout)
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.usage, self.lock = Counter(requests=0, prompt_tokens=0, completion_tokens=0), threading.Lock()

    def __call__(self, messages):
        """Returns the reply to [{"role", "content"}, ...]. Raises openai.OpenAIError where retries do not help."""
        reply = self.client.chat.completions.create(
            model=self.model, messages=messages, temperature=self.temperature, max_tokens=self.max_tokens
        )
        usage = reply.usage
        with self.lock:
            self.usage["requests"] += 1
            for name in ("prompt_tokens", "completion_tokens"):
                self.usage[name] += getattr(usage, name, None) or 0
        if not reply.choices:
            raise ValueError(f"{self.model} returned no choice")
        return reply.choices[0].message.content or ""

    def settings(self):
        """Returns what a result depends on, beside the messages. Not the address: a server may move."""
        return f"{self.model}, temperature {self.temperature}, max_tokens {self.max_tokens}"

    def cost(self, price_in=0.0, price_out=0.0):
        """Returns what this process has used. Prices: dollars for a million tokens of prompt and of reply."""
        n_in, n_out = self.usage["prompt_tokens"], self.usage["completion_tokens"]
        dollars = f", ${(n_in * price_in + n_out * price_out) / 1e6:.2f}" if price_in or price_out else ""
        return f"{self.usage['requests']:,} replies, {n_in:,} tokens of prompts, {n_out:,} of replies{dollars}"
