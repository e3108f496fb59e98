#!/usr/bin/env bash
# All benches on this machine, which should have nothing else to do; at the end it says how long they took.
#
#   benches/run.sh            the real thing: benches/results/MACHINE-KERNEL-DATE/, and the README's section "Performance"
#   benches/run.sh --quick    few rounds and small sizes, into a directory of its own under target: to see that it works
#
# Where much has run before, first, as root: echo 1 > /proc/sys/vm/compact_memory. In memory that is all small pieces a floor and ours may
# get pages that are not alike.
#
# The system calls of a fault are counted by the kernel's tracepoints: as root this mounts tracefs for as long as it runs, where it is not
# mounted; else it says that they are not counted.
#
# At the end stands a table of all targets, met or missed.
set -euo pipefail

quick=()
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=(--quick) ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    # Not taken for the real thing, which replaces results.
    *) echo "$0: what is $1?" >&2 && exit 2 ;;
    esac
    shift
done
cd "$(dirname "$0")/.."

machine=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
name=$(printf '%s-%s-%s' "$machine" "$(uname -r)" "$(date -u +%F)" | tr -cs 'A-Za-z0-9._-' '_')
out=benches/results/$name
[ ${#quick[@]} -eq 0 ] || out=${CARGO_TARGET_DIR:-target}/bench-quick

benches=(fault_latency offload protocol scaling)
echo "==> building"
cargo bench -q --locked --no-run -p benches --benches
cargo build -q --release --locked -p benches --bin report

tracefs=/sys/kernel/tracing
tracepoint=events/raw_syscalls/sys_enter/id
if [ ! -r "$tracefs/$tracepoint" ] && [ ! -r "/sys/kernel/debug/tracing/$tracepoint" ]; then
    if [ "$(id -u)" = 0 ] && mount -t tracefs nodev "$tracefs" 2>/dev/null; then
        trap 'umount "$tracefs"' EXIT
    else
        echo "==> tracefs is not mounted, or may not be read: no count of system calls, and TLB flushes are the whole machine's"
    fi
fi

# What was there goes once all is built that takes its place.
mkdir -p "$out"
into=$(realpath "$out")
rm -f "$out"/*.svg "$out"/*.json
echo "==> into $out; load $(cut -d' ' -f1-3 /proc/loadavg)"

for i in "${!benches[@]}"; do
    bench=${benches[$i]}
    echo "==> $((i + 1)) of ${#benches[@]}: $bench ($SECONDS s so far)"
    cargo bench -q --locked -p benches --bench "$bench" -- \
        --json "$into/$bench.json" --plot "$into" "${quick[@]}" |
        grep -v '^Benchmarking' | tee "$out/$bench.txt"
done

echo "==> the machine code of a hit"
benches/vectorised.sh --quiet --listing "$out/vectorised.txt"

report=(cargo run -q --release --locked -p benches --bin report -- "$out")
if [ ${#quick[@]} -eq 0 ]; then
    "${report[@]}" --readme README.md
fi
echo "==> targets"
"${report[@]}" --targets
echo "==> done in $SECONDS s: $out"
