#!/usr/bin/env bash
# Connected Arabic commands, from nothing to a table of WERs. The stages are those of the
# digits recipe; conf/corpus.sh has the defaults that differ. See README.md.
set -eou pipefail
. "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../digits/ASR/run.sh"
