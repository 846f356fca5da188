"""The prompts of the scripts that were published with arXiv 2411.04421 (on GitHub in team-approx-bayes/ivon-lora).

The label words follow them; of BoolQ's the end of the passage is cut where it is too long.
"""

from __future__ import annotations

from typing import Any

_TASK = "Select one of the choices that answers the following question:"


def prompt(task: str, row: dict[str, Any]) -> str:
    """The prompt of a row of a task as the hub has it."""
    if task == "boolq":
        return f"Answer the question with only True or False: {row['question']} Context: {row['passage']}"
    if task.startswith("winogrande"):  # the second letter has no point there
        return f"{_TASK} {row['sentence']} Choices: A. {row['option1']}. B {row['option2']}. Answer:"
    question = row["question_stem" if task == "openbookqa" else "question"]
    choices = " ".join(
        f"{letter}. {_sentence(text)}" for letter, text in zip("ABCD", row["choices"]["text"], strict=True)
    )
    return f"{_TASK} {question} Choices: {choices} Answer:"


def _sentence(text: str) -> str:
    """With a capital at its start and a point at its end."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
