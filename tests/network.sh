#!/usr/bin/env bash
# Measures the exchange of memory layers between nodes on an emulated network: four hosts of two
# ranks, as network namespaces whose links are shaped. It compares bytes and times with a
# prediction, trains through Megatron's loop over the hosts, prints one table and draws one plot.
#
#   bash tests/network.sh                      all of it, in about six minutes
#   bash tests/network.sh --no-training        only the exchange; --help lists the flags
#
# It needs Linux, root, and ip and tc of iproute2. Where the machine does not allow namespaces, it
# says so and exits with 77. Everything it makes is in namespaces of its own, which end with it,
# however it ends.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# the parent's death by any signal ends unshare, whose death ends all processes within
alone=(setpriv --pdeathsig KILL
    unshare --net --mount --pid --fork --kill-child --mount-proc)

refuse() {
    echo "tests/network.sh: nothing was measured, as hosts cannot be made here: $1" >&2
    exit 77
}

[ "$(uname -s)" = Linux ] || refuse "network namespaces are a part of Linux"
for tool in ip tc unshare setpriv; do
    command -v "$tool" >/dev/null || refuse "there is no \`$tool\`; install iproute2 and util-linux"
done
[ "$(id -u)" = 0 ] || refuse "only root may make network namespaces; run it as root"
said=$("${alone[@]}" true 2>&1) || refuse "the kernel allows no network namespaces: $said"

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
"${alone[@]}" "$python" -m tests.network "$@" &
child=$!
# an unshare that waits for its child ignores other signals
trap 'kill -KILL "$child" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
wait "$child"
