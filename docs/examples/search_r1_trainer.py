"""A trainer that knows nothing of this package but Search-R1's form: it learns what to look for.

    python -m tapo_train serve-search data/index --port 8000
    python docs/examples/search_r1_trainer.py http://127.0.0.1:8000/retrieve questions.jsonl

A line of the file is {"question", "answer"}. The policy has two numbers a word. One decides which
words of the question become <search>…</search>; of what comes back as <information>, the other of a
word chooses the word after it as <answer>. GRPO without a clip; information is read, never trained.
"""

import json
import sys
import urllib.request
import zlib

import torch

ATTEMPTS, STEPS, WORDS = 8, 25, 1 << 14


def retrieve(url: str, queries: list[str]) -> list[str]:
    """What the server finds first for each query."""
    body = json.dumps({"queries": queries, "topk": 1, "return_scores": True}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)["result"]
    return [hits[0]["document"]["contents"] if hits else "" for hits in found]


def logits(policy: torch.Tensor, words: list[str], head: int) -> torch.Tensor:
    """One a word."""
    return policy[[zlib.crc32(word.encode()) % WORDS for word in words], head]


def main(url: str, path: str) -> None:
    """Print the share of right answers of every step."""
    torch.manual_seed(0)
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        rows = [json.loads(line) for line in file for _ in range(ATTEMPTS)]
    policy = torch.zeros(WORDS, 2, requires_grad=True)
    optimizer = torch.optim.Adam([policy], lr=0.3)
    for step in range(STEPS):
        logps, searched, rewards = [], [], []
        for row in rows:
            words = row["question"].split()
            choice = torch.distributions.Bernoulli(logits=logits(policy, words, 0))
            taken = choice.sample()
            logps.append(choice.log_prob(taken).sum())
            searched.append(" ".join(w for w, is_in in zip(words, taken, strict=True) if is_in))
        for n, information in enumerate(retrieve(url, searched)):
            words = ["<information>", *information.lower().replace(".", " ").split()]
            answer = torch.distributions.Categorical(logits=logits(policy, words, 1))
            place = answer.sample()
            logps[n] = logps[n] + answer.log_prob(place)
            rewards.append(float([*words, ""][place + 1] == rows[n]["answer"]))
        reward = torch.tensor(rewards).view(-1, ATTEMPTS)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
        loss = -(advantage.flatten() * torch.stack(logps)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} right {reward.mean():.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
