#!/usr/bin/env bash
# Apply one of this folder's patches to another project, or take it back.
#
#   apply.sh PATCH TARGET             apply it
#   apply.sh PATCH TARGET --check     say whether it would apply or is applied; change nothing
#   apply.sh PATCH TARGET --reverse   take it back
#
# PATCH is a file, or the name of one beside this script: megatron-deepspeed, deepspeed-moe-gate.
# TARGET is the folder that the patch's paths begin in: a checkout, or the site-packages that hold deepspeed/.
#
# The patches have no context lines, so their line numbers hold for one version of each file. Its blob id
# stands in the patch ("index BEFORE..AFTER"): a TARGET whose files have any other is refused and stays as it
# is. A new file is left out where TARGET lacks its folder (an installed package has no tests/).
#
# Exit status: 0 done, or there was nothing to do; 1 refused; 2 wrong call.
set -euo pipefail

here=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unset GIT_DIR GIT_WORK_TREE
left_out=()

wrong_call() {
  printf 'apply.sh: %s\nusage: apply.sh PATCH TARGET [--check | --reverse]\n' "$1" >&2
  exit 2
}

refuse() {
  printf 'apply.sh: %s; nothing was changed\n' "$1" >&2
  exit 1
}

# BEFORE, AFTER and path of every file in the patch, one a line.
files() {
  awk '/^diff --git / { path = substr($4, 3) } /^index / { split($2, id, /\.\./); print id[1], id[2], path }' "$patch"
}

# Sets state: "before" or "after" the patch, for all of its files alike.
find_state() {
  local before after path id here_now
  state=
  while read -r before after path; do
    if [[ $before =~ ^0+$ && ! -d $target/$(dirname "$path") ]]; then
      left_out+=("$path")
      continue
    fi
    id=$before
    if [[ -f $target/$path ]]; then
      id=$(git hash-object --no-filters "$target/$path")
    elif [[ ! $before =~ ^0+$ ]]; then
      refuse "there is no $path in $target"
    fi
    case $id in
      "$before") here_now=before ;;
      "$after") here_now=after ;;
      *) refuse "$path is another version than $name was made for ($(origin))" ;;
    esac
    [[ -z $state || $state == "$here_now" ]] || refuse "$name is applied to a part of $target only"
    state=$here_now
  done < <(files)
  [[ -n $state ]] || refuse "no file of $name is in $target"
}

# What the patch's header says about its upstream, on one line.
origin() {
  awk '/^Upstream: / { on = 1; sub(/^Upstream: /, "") } /^$/ { on = 0 } on { printf "%s%s", gap, $0; gap = " " }' "$patch"
}

# From inside TARGET, and blind to a repository around it, in which git would skip the files without a word.
git_apply() {
  local path exclude=()
  for path in ${left_out[@]+"${left_out[@]}"}; do
    exclude+=("--exclude=$path")
  done
  (cd "$target" && GIT_CEILING_DIRECTORIES=$(dirname "$target") git apply --unidiff-zero --whitespace=nowarn \
    ${exclude[@]+"${exclude[@]}"} "$@" "$patch")
}

[[ $# -ge 2 && $# -le 3 ]] || wrong_call "two or three arguments are needed, not $#"
mode=${3:---apply}
[[ $mode == --apply || $mode == --check || $mode == --reverse ]] || wrong_call "there is no option $mode"
patch=$1
[[ -f $patch ]] || patch=$here/${1%.patch}.patch
[[ -f $patch ]] || wrong_call "there is no patch $1"
[[ -d $2 ]] || wrong_call "there is no folder $2"
patch=$(cd -P "$(dirname "$patch")" && pwd)/$(basename "$patch")
target=$(cd -P "$2" && pwd)
name=$(basename "$patch" .patch)

find_state
case $mode/$state in
  --apply/before) git_apply; verb="applied to" ;;
  --reverse/after) git_apply --reverse; verb="taken back from" ;;
  --check/before) git_apply --check; verb="would apply to" ;;
  --check/after) git_apply --reverse --check; verb="is applied to" ;;
  --apply/after) verb="was already applied to" ;;
  --reverse/before) verb="is not applied to" ;;
esac
echo "$name $verb $target"
for path in ${left_out[@]+"${left_out[@]}"}; do
  echo "  without $path: its folder is not there"
done
