#!/bin/bash
# Runs on the nodes, before each rank's program:  rank.sh COMMAND...  or, once a node,  rank.sh --stage MODEL
set -eu

fail() {
  echo "error: $(hostname): $*" >&2
  exit 2
}

# Kernels that are loaded from a folder are run: nobody else may have made it.
mkdir -p "$(dirname "$DLLAMA_LOCAL")"
mkdir -m 700 "$DLLAMA_LOCAL" 2>/dev/null || true
[[ -d $DLLAMA_LOCAL && ! -L $DLLAMA_LOCAL && -O $DLLAMA_LOCAL && -w $DLLAMA_LOCAL ]] ||
  fail "DLLAMA_LOCAL=$DLLAMA_LOCAL is no folder that $(id -un) owns and can write to; choose another in site.sh"

if [ "$1" = --stage ]; then # what has the same names, sizes and times is there already
  from=$2 to=$DLLAMA_LOCAL/models$2
  about() { (cd "$1" 2>/dev/null && find -L . -type f -printf '%P %s %T@\n' | sort) || stat -L -c '%s %Y' "$1"; }
  mkdir -p "$(dirname "$to")"
  exec 9>"$to.lock"
  flock 9 # two jobs on one node
  if [ -e "$to" ] && [ "$(about "$from")" = "$(cat "$to.copied" 2>/dev/null)" ]; then exit 0; fi
  rm -rf "$to" "$to.copied"
  need=$(du -skL "$from" | cut -f1) free=$(df -Pk "$DLLAMA_LOCAL" | awk 'NR == 2 {print $4}')
  [ "$need" -lt "$free" ] || fail "$from needs $((need >> 20)) GiB, and $DLLAMA_LOCAL has $((free >> 20)) GiB free; set DLLAMA_STAGE=read"
  about "$from" >"$to.about"
  cp -rL --preserve=timestamps "$from" "$to" || fail "$from could not be copied to $to"
  mv "$to.about" "$to.copied"
  echo "$(hostname): copied $from to $to ($((need >> 10)) MiB)" >&2
  exit 0
fi

export NUMBA_CACHE_DIR=$DLLAMA_LOCAL/kernels
number=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}}
[ "$number" != 0 ] || echo $$ >"$DLLAMA_LOCAL/root-$SLURM_JOB_ID" # for `drain` of common.sh
exec "$@"
