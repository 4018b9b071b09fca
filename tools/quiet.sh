#!/usr/bin/env bash
# quiet.sh NAME COMMAND…: runs the command, shows its output only when it fails.
set -uo pipefail
name=$1
shift
mkdir -p .cache
log=.cache/$name.log
echo "build: $name"
if ! "$@" >"$log" 2>&1; then
  cat "$log" >&2
  echo "build: $name failed (above)" >&2
  exit 1
fi
