"""A judge of one's own, as one file outside the package: how polite is the answer?

reward.parts.polite: {name: custom, path: kind_judge:KindJudge, weight: 0.2,
                      arguments: {url: "http://127.0.0.1:8000/judge"}}
"""

from __future__ import annotations

import json

from tapo_train.tools.addresses import AllowedHosts, host_of_endpoint
from tapo_train.tools.net import HttpClient
from tapo_train.types import Trajectory


class KindJudge:
    """Asks a server for a number in [0, 1]. Whatever it raises leaves the trajectory out."""

    def __init__(self, url: str) -> None:
        self._url = url
        host = host_of_endpoint(url, field="url of KindJudge")
        self._client = HttpClient(allowed=AllowedHosts.parse([host]))

    async def __call__(self, trajectory: Trajectory) -> float:
        """The server's number."""
        asked = json.dumps({"question": trajectory.task.question, "answer": trajectory.answer})
        said = await self._client.post(self._url, asked.encode(), content_type="application/json")
        grade = json.loads(said.data)["grade"]
        if not isinstance(grade, (int, float)) or not 0 <= grade <= 1:
            raise ValueError(f"the judge gave {grade!r}; wanted a number in [0, 1]")
        return float(grade)
