#!/usr/bin/env bash
# Installs what building and testing need and is not there yet: Debian packages, pnpm, npm dependencies. Repeating it is
# cheap. What it can't install (Node, Go) it names with the command that does.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $1" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || fail "Holdfast runs on Linux; this is $(uname -s)."
[ "$(id -u)" = 0 ] || fail "volumes, loop devices and mounts need root. Run it again with sudo."
command -v node >/dev/null || fail "Node.js 20 or newer is missing. Install it, for example: apt-get install nodejs npm (Debian 13, Ubuntu 25.04), or from nodejs.org."
node -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 11) ? 0 : 1)' ||
  fail "Node.js $(node -v) is too old; 20.11 or newer is needed. Install it from nodejs.org or your distribution's newer release."
command -v npm >/dev/null || fail "npm is missing. Install it: apt-get install npm"

packages=(build-essential cmake pkg-config python3 liburing-dev libblkid-dev libgtest-dev
  e2fsprogs xfsprogs btrfs-progs util-linux fio kmod procps)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  command -v apt-get >/dev/null || fail "these packages are missing, and there is no apt-get to install them: ${missing[*]}"
  echo "setup: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
[ -e /dev/fuse ] || modprobe fuse 2>/dev/null || fail "/dev/fuse is missing: load the fuse module (modprobe fuse)."
[ -e /dev/loop-control ] || modprobe loop 2>/dev/null || fail "/dev/loop-control is missing: load the loop module (modprobe loop)."

# The pinned pnpm, beside the checkout; on PATH as well where there is none.
pnpm_version=10.34.9
mkdir -p .cache
if [ "$(.cache/pnpm/node_modules/.bin/pnpm --version 2>/dev/null || true)" != "$pnpm_version" ]; then
  echo "setup: installing pnpm $pnpm_version"
  npm install --silent --no-fund --no-audit --prefix .cache/pnpm "pnpm@$pnpm_version" >/dev/null
fi
# The Makefile puts the pinned one first on PATH; what counts is whether the user's own shell finds one.
PATH=${PATH//"$PWD/.cache/pnpm/node_modules/.bin:"/} command -v pnpm >/dev/null || npm install --silent --no-fund --no-audit -g "pnpm@$pnpm_version" >/dev/null
export PATH="$PWD/.cache/pnpm/node_modules/.bin:$PATH"
stamp=node_modules/.holdfast-lock
# SQLite's addon is built for one version of Node.js' interface: another Node.js needs it built again.
abi=$(node -p process.versions.modules)
abi_stamp=node_modules/.holdfast-abi
if ! cmp -s pnpm-lock.yaml "$stamp"; then
  echo "setup: installing npm dependencies"
  pnpm install --frozen-lockfile --reporter=append-only >.cache/pnpm-install.log 2>&1 || { tail -40 .cache/pnpm-install.log >&2; fail "pnpm install failed (above)."; }
  cp pnpm-lock.yaml "$stamp"
elif [ "$(cat "$abi_stamp" 2>/dev/null)" != "$abi" ]; then
  tools/quiet.sh sqlite pnpm rebuild -r better-sqlite3
fi
echo "$abi" >"$abi_stamp"
