"""Small invented databases with questions and their SQL, so that text to SQL runs offline.

    python -m tapo_train.systems.invented_databases --seed 1 --out runs/sql

    OUT/databases/D.sqlite      two tables of invented shops and their sales
    OUT/{train,validation}.jsonl  native tasks; the field `database` names the file

No split shares a database with another. A question whose query finds nothing is not asked.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tapo_train.data.tasks import write_tasks
from tapo_train.demo.world.lexicon import CLOSED_ATTRIBUTES, draw_name
from tapo_train.types import Task

__all__ = ["write_databases"]

SCHEMA = (
    "CREATE TABLE shop (id INTEGER PRIMARY KEY, name TEXT, town TEXT, founded INTEGER)",
    "CREATE TABLE sale (shop_id INTEGER REFERENCES shop, ware TEXT, pieces INTEGER, price REAL)",
)
SHOWN = "shop(id, name, town, founded), sale(shop_id, ware, pieces, price)"
SHOPS, SALES = 8, 40
WARES = CLOSED_ATTRIBUTES["trade"]


def write_databases(out: Path, seed: int, *, train: int = 12, validation: int = 4) -> None:
    """So many databases of each split, with the questions about them."""
    folder = out / "databases"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", validation)):
        tasks = []
        for number in range(count):
            name = f"{split}{number}.sqlite"
            rng = random.Random(f"sql/{seed}/{name}")
            tasks += _tasks(folder / name, rng)
        write_tasks(out / f"{split}.jsonl", tasks)


def _tasks(path: Path, rng: random.Random) -> list[Task]:
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        towns = [draw_name(rng, num_syllables=2) for _ in range(3)]
        _fill(connection, rng, towns)
        connection.commit()
        return [
            Task(
                id=f"{path.stem}.{number}",
                question=f"Tables: {SHOWN}. {question}",
                images=(),
                answers=(sql,),
                source="invented_sql",
                metadata={"database": path.name},
            )
            for number, (question, sql) in enumerate(_questions(rng, towns))
            if any(value is not None for row in connection.execute(sql) for value in row)
        ]


def _fill(connection: sqlite3.Connection, rng: random.Random, towns: Sequence[str]) -> None:
    """Some towns, pieces and prices are NULL, as in real tables."""
    for statement in SCHEMA:
        connection.execute(statement)
    for shop in range(SHOPS):
        town = rng.choice([*towns, None])
        row = (shop, draw_name(rng, num_syllables=3), town, rng.randint(1700, 1990))
        connection.execute("INSERT INTO shop VALUES (?, ?, ?, ?)", row)
    for _ in range(SALES):
        pieces = rng.choice([None, *range(1, 20)])
        price = rng.choice([None, *(number / 4 for number in range(4, 80))])
        sale = (rng.randrange(SHOPS), rng.choice(WARES), pieces, price)
        connection.execute("INSERT INTO sale VALUES (?, ?, ?, ?)", sale)


def _questions(rng: random.Random, towns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(question, query): a filter, aggregates, groups, an order, a join, what is missing."""
    town, year, ware = rng.choice(towns), rng.randint(1750, 1900), rng.choice(WARES)
    yield f"Which shops are in {town}?", f"SELECT name FROM shop WHERE town = '{town}'"
    yield (
        f"How many shops were founded after {year}?",
        f"SELECT COUNT(*) FROM shop WHERE founded > {year}",
    )
    yield (
        f"What is the mean price of {ware}?",
        f"SELECT AVG(price) FROM sale WHERE ware = '{ware}'",
    )
    yield (
        "List the three oldest shops, the oldest first.",
        "SELECT name FROM shop ORDER BY founded, id LIMIT 3",
    )
    yield (
        "How many pieces of each ware were sold?",
        "SELECT ware, SUM(pieces) FROM sale GROUP BY ware",
    )
    yield (
        f"Which shops have sold {ware}?",
        f"SELECT DISTINCT name FROM shop JOIN sale ON sale.shop_id = shop.id WHERE ware = '{ware}'",
    )
    yield "Which shops have no town?", "SELECT name FROM shop WHERE town IS NULL"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write databases and questions to a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=12, help="databases (default 12)")
    parser.add_argument("--validation", type=int, default=4, help="databases (default 4)")
    chosen = parser.parse_args(arguments)
    write_databases(chosen.out, chosen.seed, train=chosen.train, validation=chosen.validation)


if __name__ == "__main__":
    main()
