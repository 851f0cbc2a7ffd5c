#!/usr/bin/env bash
# Sourced by the other scripts: goes to the repository's root and gives `blip_env EXTRAS`.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# blip_env [extra,extra]: put a virtual environment with this checkout and these extras first on PATH.
# It lies in .venv, or where BLIP_VENV says. Done before with this pyproject.toml: takes no time.
# Needs Python >= 3.11 (PYTHON names another one) and a package registry, by pip's own configuration.
blip_env() {
  local extras=${1:-} venv=${BLIP_VENV:-.venv} python stamp state
  if [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    echo "error: $venv is there and is no virtual environment; set BLIP_VENV to another folder" >&2
    return 2
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(blip_python) || return 2
    "$python" -m venv "$venv" || {
      echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
      return 2
    }
  fi
  venv=$(cd "$venv" && pwd)
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
  hash -r

  stamp=$venv/.blip-core${extras:+-${extras//,/-}}
  state="$(cksum <pyproject.toml) $PWD"
  [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return 0
  echo "Installing blip${extras:+[$extras]} into $venv (torch and what it needs: some 5 GB, minutes) ..."
  blip_install -e ".${extras:+[$extras]}" || return
  echo "$state" >"$stamp"
}

# PYTHON, or else the first Python that is new enough.
blip_python() {
  local python candidates=(python3 python python3.13 python3.12 python3.11)
  [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  echo "error: no Python >= 3.11 among ${candidates[*]}; install one, or set PYTHON to its path" >&2
  return 2
}

# uv is faster where it is installed, but does not read pip's configuration: pip has the last word.
blip_install() {
  if command -v uv >/dev/null && uv pip install --quiet --python "$VIRTUAL_ENV/bin/python" "$@"; then
    return
  fi
  python -m pip install --quiet --no-input --disable-pip-version-check "$@"
}
