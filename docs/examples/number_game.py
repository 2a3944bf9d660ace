"""An environment of one's own, as one file outside the package: guess a number.

tools.environment=number_game:NumberGame
reward.parts.accuracy={name: environment, attribute: reward}
"""

from __future__ import annotations

from typing import Any


class NumberGame:
    """The number is the task's answer; the reward falls with every guess."""

    def __init__(self) -> None:
        self.reward = 0.0
        self.guesses = 0

    def reset(self, *, answers: list[str], **row: Any) -> str:
        """A new number. What is returned is shown after the question."""
        self.number, self.guesses, self.reward = int(answers[0]), 0, 0.0
        return "It is between 0 and 99."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: between 0 and 99
        """
        if not 0 <= number <= 99:
            raise ValueError("the number is between 0 and 99")
        self.guesses += 1
        if number == self.number:
            self.reward = 1 / self.guesses
            return "That is it."
        return "It is larger." if number < self.number else "It is smaller."
