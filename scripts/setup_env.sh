#!/usr/bin/env bash
# Makes .venv with everything the project needs, mends what is known to come broken, and says
# what it did. Run again it returns at once, without the network, until setup.cfg,
# pyproject.toml or this script changes.
#
#   scripts/setup_env.sh                    CPU environment with development tools
#   EXTRAS=gpu,dev scripts/setup_env.sh     the same with CUDA builds
#   PYTHON=python3.12 scripts/setup_env.sh  another interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
CHOICE=$VENV/.tapo_extras
EXTRAS=${EXTRAS:-$(cat $CHOICE 2>/dev/null || echo cpu,dev)}
STAMP=$VENV/.tapo_setup
CPU_INDEX=https://download.pytorch.org/whl/cpu
# Where a CUDA build of these meets a CPU torch, transformers and vllm cannot be imported.
OPTIONAL_MODULES="torchaudio torchcodec"

say() { echo "setup: $*"; }

fingerprint() {
  { echo "$PWD $EXTRAS"; cat setup.cfg pyproject.toml scripts/setup_env.sh \
    scripts/torchvision_ops_hook.py; } | sha256sum | cut -d' ' -f1
}

imports() { "$VENV/bin/python" -c "import $1" >/dev/null 2>&1; }
installed() { "$VENV/bin/python" -m pip show -q "$1" >/dev/null 2>&1; }
site_packages() { "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

make_venv() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "$PYTHON is $("$PYTHON" --version); Python 3.11 or newer is needed (set PYTHON=…)"; exit 1; }
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || rm -rf $VENV # half made
  [ -x $VENV/bin/python ] || { say "making $VENV with $("$PYTHON" --version)"; "$PYTHON" -m venv $VENV; }
}

install_packages() {
  local index=()
  if [[ ",$EXTRAS," == *,cpu,* ]] && ! installed torch &&
    ! "$VENV/bin/python" -m pip install -q --dry-run --no-deps "torch==2.13.0+cpu" >/dev/null 2>&1; then
    say "pip does not offer torch==2.13.0+cpu here: adding PyTorch's index of CPU builds"
    index=(--extra-index-url "$CPU_INDEX")
  fi
  say "installing tapo_train[$EXTRAS] (some minutes the first time)"
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check "${index[@]}" -e ".[$EXTRAS]"
}

mend_imports() {
  local hook module
  hook=$(site_packages)/torchvision_ops_hook
  for module in $OPTIONAL_MODULES; do
    if installed "$module" && ! imports "$module"; then
      say "$module does not load beside this torch and is not needed: removed"
      "$VENV/bin/python" -m pip uninstall -q -y "$module"
    fi
  done
  if TORCHVISION_OPS_HOOK=off imports torchvision; then
    rm -f "$hook.py" "$hook.pth"
  else
    cp scripts/torchvision_ops_hook.py "$hook.py"
    echo "import torchvision_ops_hook" >"$hook.pth"
    say "torchvision was built for another torch: its operators are declared by an import hook"
  fi
  for module in torchvision transformers deepspeed vllm; do
    imports "$module" || { say "import $module fails: $VENV/bin/python -c 'import $module' shows why"; exit 1; }
  done
}

kind() { [[ ",$1," == *,gpu,* ]] && echo gpu || echo cpu; }

if [ -f $CHOICE ] && [ "$(kind "$EXTRAS")" != "$(kind "$(cat $CHOICE)")" ]; then
  say "$VENV holds [$(cat $CHOICE)]; CPU and CUDA builds do not mix: rm -rf $VENV, then again"
  exit 1
fi
wanted=$(fingerprint)
if [ -x $VENV/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
make_venv
echo "$EXTRAS" >$CHOICE
install_packages
mend_imports
echo "$wanted" >$STAMP
say "done: source $VENV/bin/activate, then python -m tapo_train doctor"
