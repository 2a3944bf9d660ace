"""Import hook that lets a torchvision built for CUDA load beside a CPU build of torch.

Such a torchvision cannot load its compiled operators, and `import torchvision`
then stops at "operator torchvision::nms does not exist". Nothing in this project
calls these operators: it is enough that they are declared before torchvision's
own Python modules refer to them.

`setup_env.sh` copies this file into the environment's site-packages together with
a one-line `.pth` file, so that the hook is there in every process of the environment
(vLLM starts some of its own). It costs nothing until torchvision is imported: torch is
not touched before that. It is installed only where `import torchvision` fails without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # keeps the library object alive: dropping it undoes the declaration


def _declare_operators() -> None:
    from torch import library

    if _declared:
        return
    operators = library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        operators.define(schema)
    _declared.append(operators)


class TorchvisionOpsFinder:
    """Declares the operators just before torchvision's `__init__` runs."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            _declare_operators()
            run_module(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("TORCHVISION_OPS_HOOK") != "off":
    sys.meta_path.insert(0, TorchvisionOpsFinder)
