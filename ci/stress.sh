#!/usr/bin/env bash
# The stress, for each door, granule and forced fallback: workers and CPU threads on shared counters and checked
# pages; then the storm.
#
#   ci/stress.sh           60 s each
#   ci/stress.sh --quick   a second each
#   ci/stress.sh SECONDS
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-60}" in
    --quick) seconds=1 ;;
    *) seconds="${1:-60}" ;;
esac

cargo build --release --locked -p tests --bin stress --bin storm
stress="${CARGO_TARGET_DIR:-target}/release/stress"

run() {
    echo "\$ ${SVM_DISABLE:+SVM_DISABLE=$SVM_DISABLE }stress $*"
    timeout --kill-after=10 $((seconds + 60)) "$stress" --seconds "$seconds" "$@"
}

for delivery in inline thread; do
    for granule in 4k 64k 2m; do
        run --delivery "$delivery" --granule "$granule"
        SVM_DISABLE=move run --delivery "$delivery" --granule "$granule"
    done
    for missing in wp_async poison kernel_faults events pagemap_scan procmap_query membarrier process_vm; do
        SVM_DISABLE="$missing" run --delivery "$delivery"
    done
done
# Without SIGBUS delivery there is one door left.
SVM_DISABLE=sigbus run --delivery thread
run --device-memory none

# The storm: every change of the mappings there is, by bare calls and by ours.
storm="${CARGO_TARGET_DIR:-target}/release/storm"
for missing in "" move events; do
    echo "\$ SVM_DISABLE=$missing storm --seconds $seconds"
    SVM_DISABLE="$missing" timeout --kill-after=10 $((seconds + 60)) "$storm" --seconds "$seconds"
done
