#!/bin/sh
# The models: the synchronisation primitives and the range protocol under loom, the protocols known to be wrong, whole fault paths
# under Shuttle over a model of the kernel, and the mutations of our own code. Prints how many schedules each took, and for what
# must fail, one in which it does.
#
#   ci/models.sh           every model with 3 preemptions, quick ones with more; fault paths from fresh seeds; minutes
#   ci/models.sh --quick   every model with 2 preemptions; fault paths from seed 1; under a minute, once built
#   ci/models.sh [--quick] NAME
#                          only what has NAME in its path, e.g. wrong:: or mutations, evictions or UnprotectFirst; ladders are printed
#   ci/models.sh --replay SCENARIO SCHEDULE [MUTATION]
#                          one schedule of a fault path again, as printed by the run that found it; SVM_SHUTTLE_STEPS=n shows more of it
set -eu
cd "$(dirname "$0")/.."

# Fault paths under Shuttle: runtime/shuttle.
paths() {
    RUSTFLAGS="${RUSTFLAGS-} --cfg svm_shuttle" \
        cargo run --release --target-dir "${CARGO_TARGET_DIR:-target}/shuttle" -p svm-shuttle -- "$@"
}

case ${1-} in
--replay)
    paths "$@"
    exit
    ;;
--quick)
    shift
    MODELS_QUICK=1
    export LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-2}"
    ;;
*)
    export LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}"
    export MODELS_DEEPEN_BELOW_MS="${MODELS_DEEPEN_BELOW_MS:-500}"
    ;;
esac

# A limit of loom's or of the caller's would end the search early and call it a success.
unset LOOM_MAX_PERMUTATIONS LOOM_MAX_DURATION LOOM_CHECKPOINT_FILE

export RUST_BACKTRACE=0
RUSTFLAGS="${RUSTFLAGS-} --cfg svm_loom" \
    cargo test --release --target-dir "${CARGO_TARGET_DIR:-target}/loom" -p svm-models --lib "${1-}" -- --nocapture

paths ${MODELS_QUICK:+--quick} ${1:+"$1"}

# The shootdown handshake's models are a test of accel-sim's, hence of `cargo test --workspace`; here they run optimised and
# without a bound.
if [ -z "${MODELS_QUICK-}${1-}" ]; then
    env -u LOOM_MAX_PREEMPTIONS cargo test --release -p accel-sim --test models
fi
