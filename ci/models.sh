#!/bin/sh
# The models: the synchronisation primitives and the range protocol under loom, the protocols known to be wrong, and the
# mutations of our own code. Prints how many schedules each took, and for what must fail, one in which it does.
#
#   ci/models.sh           every model with 3 preemptions, quick ones with more; minutes
#   ci/models.sh --quick   every model with 2 preemptions; seconds, once built
#   ci/models.sh [--quick] NAME
#                          only the models whose path contains NAME, e.g. wrong:: or mutations; ladders are printed
set -eu
cd "$(dirname "$0")/.."

case ${1-} in
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

# The shootdown handshake's models are a test of accel-sim's, hence of `cargo test --workspace`; here they run optimised and
# without a bound.
if [ -z "${MODELS_QUICK-}${1-}" ]; then
    env -u LOOM_MAX_PREEMPTIONS cargo test --release -p accel-sim --test models
fi
