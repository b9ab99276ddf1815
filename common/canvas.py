"""Tasks as sequences with masks, for models that fill in what is missing: tasks -> Canvas -> decoded ids -> texts.

prompt    template            canvas.ids [B, T], M the mask        canvas.solved [B, T]
""        "_21_"              M 2 1 M                              3 2 1 4
"7+5="    "" (no template)    7 + 5 = M M M M                      7 + 5 = 1 2 end end
"""

from typing import NamedTuple

import torch

from common.tasks import BLANK
from kernels import fresh_casts


class Canvas(NamedTuple):
    """Tasks as a decoder takes them: prompts on the left, completions, with masks, end at the right edge."""

    ids: torch.Tensor  # [B, T] int64: the prompt, then the completion with masks for what it leaves open
    solved: torch.Tensor  # [B, T] int64: the same with the task's demonstration for the completion
    keys: torch.Tensor | None  # bool [B, T], False on the padding before a short prompt; None: there is no padding

    def maskable(self, mask_id):
        """Returns bool [B, T]: the tokens to predict."""
        return self.ids == mask_id


def canvas_of(tasks, tokenizer, mask_id, max_new_tokens, device="cpu"):
    """Returns the Canvas of tasks: a prompt and its template, whose blanks are masked.

    A task without a template has max_new_tokens masks behind its prompt. There the demonstration is filled up with ends
    of text, and a completion ends at the first of them.
    """
    end, rows = tokenizer.end_of_text, {}
    for task in dict.fromkeys(tasks):
        prompt, answer = tokenizer.encode(task.prompt), tokenizer.encode(task.demonstration)
        if task.template:
            given = tokenizer.encode(task.template)  # one id for each letter: the tokenizer is "bytes"
            body = [mask_id if letter == BLANK else i for letter, i in zip(task.template, given)]
        else:
            body, answer = [mask_id] * max_new_tokens, answer + [end] * (max_new_tokens - len(answer))
        rows[task] = prompt + body, prompt + answer
    index = {task: i for i, task in enumerate(rows)}
    T, which = max(len(ids) for ids, _ in rows.values()), torch.tensor([index[task] for task in tasks])
    padded = [[[end] * (T - len(part)) + part for part in pair] for pair in rows.values()]
    keys = torch.tensor([[i >= T - len(ids) for i in range(T)] for ids, _ in rows.values()])
    ids, solved = torch.tensor(padded)[which].to(device).unbind(1)
    return Canvas(ids, solved, None if keys.all() else keys[which].to(device))


def completions(tasks, ids, tokenizer, max_new_tokens):
    """Returns the text of each task's completion in ids [B, T], up to the first end of text."""
    texts = []
    for task, row in zip(tasks, ids.tolist()):
        row = row[-(len(task.template) or max_new_tokens) :]
        end = row.index(tokenizer.end_of_text) if tokenizer.end_of_text in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts


@torch.no_grad()
@fresh_casts()
def completion_logprob(model, tasks, texts, tokenizer):
    """Returns the mean log-probability [B] of the tokens of completions, end of text included.

    model: autoregressive, with `logprobs(ids [B, T], mask [B, T - 1])`. tasks, texts: lists of B.
    """
    end, device = tokenizer.end_of_text, next(model.parameters()).device
    rows = [(tokenizer.encode(task.prompt), tokenizer.encode(text)) for task, text in zip(tasks, texts)]
    T = max(len(prompt) + len(text) for prompt, text in rows) + 2
    padded = [[end, *prompt, *text] + [end] * (T - 1 - len(prompt) - len(text)) for prompt, text in rows]
    mask = torch.zeros(len(rows), T - 1, dtype=torch.bool)  # of the targets
    for row, (prompt, text) in enumerate(rows):
        mask[row, len(prompt) : len(prompt) + len(text) + 1] = True
    mask = mask.to(device)
    logprob, _ = model.logprobs(torch.tensor(padded, device=device), mask)
    return (logprob * mask).sum(1) / mask.sum(1)
