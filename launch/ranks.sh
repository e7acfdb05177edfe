# shellcheck shell=bash
# The running half of pretrain.sh: where machines meet, signals on their way to torchrun, what its ranks ended with.
# shellcheck disable=SC2034,SC2154  # pretrain.sh reads some of these, and sets the options and `command`

declare -A passed=()
child='' stopped='' stopped_at='' again='' # torchrun; the signal that it got, and when; whether another came
begun='' trained='' unmet='' attempted=0   # whether ranks have trained, at all and in the last attempt, or never met
shutdown_timeout=600                       # seconds that ranks have to save, until torchrun kills them

# Also where nobody reads it any more.
say() {
  printf 'pretrain.sh: %s\n' "$1" >&2 || true
}

# The name of many machines is 127.0.1.1 to themselves, at which gloo would have the others look for them.
warn_of_loopback() {
  if [[ -z ${GLOO_SOCKET_IFNAME:-} && $(getent hosts "$HOSTNAME" || true) == @(127.|::1)* ]]; then
    say "$HOSTNAME is a loopback address here; set GLOO_SOCKET_IFNAME, by which ranks meet also where NCCL does the work"
  fi
}

# What torchrun tells after its patience has ended, or never. A name may come late: a pod has one once it runs.
check_place() {
  local problem status told='' last=$((SECONDS + join_timeout))
  while :; do
    status=0
    problem=$(look_at_place) || status=$?
    case $status in
      3) fail "$problem" ;;
      4) [[ -z $stopped ]] || return 0 ;;
      *) return 0 ;;
    esac
    if ((SECONDS >= last)); then
      say "$problem, in $join_timeout s"
      return 1
    fi
    [[ -n $told ]] || say "$problem; trying for $join_timeout s"
    told=yes
    sleep 2 || true
  done
}

look_at_place() {
  python3 - "${rendezvous%:*}" "$node_rank" "$port" ${preflight:+$((port + 1))} <<'PYTHON'
import socket, sys

host, rank, *ports = sys.argv[1].strip("[]"), *sys.argv[2:]
try:
    socket.getaddrinfo(host, None)
except OSError as error:
    print(f"the host of --rendezvous, {host}, cannot be found from here ({error.strerror})")
    sys.exit(4)
for port in ports if rank == "0" else ():
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        print(f"port {port} of this machine, of --rendezvous or the next, cannot be used ({error.strerror}): name another")
        sys.exit(3)
PYTHON
}

# Run a command in a process group of its own, so that a Ctrl-C reaches it once, by way of the trap. Its exit status.
run() {
  local status=0 watcher
  set -m
  "$@" &
  child=$!
  set +m
  end_when_ranks_have &
  watcher=$!
  disown "$watcher" # bash would tell of its end
  if [[ -n $stopped ]]; then
    kill -s "$stopped" "$child"
  fi
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # a signal ends it before the command ends
  done
  wait "$child" || status=$?
  child=
  kill -KILL "$watcher" 2>/dev/null || true
  return "$status"
}

# On a machine that is cut off, torchrun waits for its meeting place as long as TCP does, a quarter of an hour, and
# hears no signal. Ranks leave their status just before they end; torchrun needs 30 s at most to end those that cannot.
# Nor does it give up where something else listens at the place to meet.
end_when_ranks_have() {
  local left=90 patience=$((5 * (join_timeout + 60)))
  # Where the kernel does not tell of a process's children, all have met.
  compgen -G "/proc/$$/task/*/children" >/dev/null || : >"$SSR_EXIT_FILE.met"
  trap '' TERM INT USR1 HUP PIPE # they come to the whole group, and a subshell has not its parent's traps
  while ((left > 0 && patience > 0)); do
    if ((nodes > 1)) && [[ ! -e $SSR_EXIT_FILE.met ]]; then
      sleep 0.2 >/dev/null 2>&1 # ranks may end at once, by a misspelt option
      patience=$((patience - 1))
      # torchrun starts them when all machines are there.
      [[ -z $(ranks_of "$child") ]] || : >"$SSR_EXIT_FILE.met"
    else
      sleep 1 >/dev/null 2>&1
      [[ ! -s $SSR_EXIT_FILE ]] || left=$((left - 1))
    fi
    kill -0 "$child" 2>/dev/null || return 0
  done
  if ((patience > 0)); then
    say "the ranks ended 90 s ago, and torchrun waits for another machine: ending it"
  fi
  # shellcheck disable=SC2046  # process ids
  kill -KILL $(ranks_of "$child") "$child" 2>/dev/null || true
}

ranks_of() { # PROCESS
  cat "/proc/$1/task/"*/children 2>/dev/null || true
}

# Within five seconds once: Slurm tells every process of a step, and a third one tears torchrun from its ranks.
# shellcheck disable=SC2329  # the traps call it
pass_on() {
  if ((SECONDS - ${passed[$1]:--9} > 5)); then
    passed[$1]=$SECONDS
    [[ -z $stopped ]] || again=yes
    stopped=$1
    : "${stopped_at:=$SECONDS}"
    if [[ -n $child ]]; then
      kill -s "$1" "$child" 2>/dev/null || true
    fi
  fi
}

# The ranks' own exit status, which torchrun replaces by 1. Beside its file they leave `.started` when only a fault can
# end them without a word, and `.begun` when the run is theirs to go on with.
run_ranks() {
  local status=0
  : >"$SSR_EXIT_FILE"
  rm -f "$SSR_EXIT_FILE".*
  trained='' unmet=''
  attempted=$SECONDS
  run "${command[@]}" || status=$?
  [[ ! -e $SSR_EXIT_FILE.begun ]] || trained=yes begun=yes
  if [[ -s $SSR_EXIT_FILE ]]; then
    status=$(<"$SSR_EXIT_FILE")
    if [[ $status == 75 && -z $stopped$trained ]]; then
      say "a rank was killed, or crashed, before training had begun, and torchrun ended the others"
      status=69
    fi
    explain "$status"
  elif [[ $status != 0 && -z $stopped && ! -e $SSR_EXIT_FILE.met ]] && ((nodes > 1)); then
    unmet=yes status=1
  elif [[ $status == 1 && -z $again && -e $SSR_EXIT_FILE.started ]]; then
    say "a rank was killed, or crashed, and the others of this machine left no word"
    status=69
  elif [[ -n $stopped && $status != 0 ]]; then
    silent_end "$status" || status=$?
  fi
  return "$status"
}

tell_unmet() {
  [[ -z $unmet ]] ||
    say "torchrun ended after $((SECONDS - attempted)) s, before all $nodes machines had met at $rendezvous. Unless it says why: are --id (here $id), --nodes, --rendezvous and --no-preflight alike on all, --node-rank 0 on the machine of --rendezvous, and its ports open?"
}

# The last line on every machine: rank 0 has said more, on its own.
explain() { # STATUS
  case $1 in
    69) say "exit status 69: a rank was lost or stalled; go on with --resume" ;;
    74) say "exit status 74: the last checkpoint could not be written; make room and go on with --resume" ;;
    75 | 130) say "exit status $1: stopped by a signal, nothing is lost; go on with --resume" ;;
  esac
}

# The status of a run that a signal has ended and whose ranks have left none. Ranks leave one however they end, but for
# those that a signal kills while Python still starts, and those that are killed with -KILL or never came to be.
silent_end() { # STATUS_OF_TORCHRUN
  local number after=$((SECONDS - stopped_at))
  number=$(kill -l "$stopped")
  if [[ -n $again ]]; then
    say "SIG$stopped after another signal ended the run at once"
    return $((128 + number))
  elif (($1 != 1 && $1 != 128 + number)); then
    say "after SIG$stopped torchrun ended with $1, and its ranks left no word"
    return "$1"
  elif ((after >= shutdown_timeout)); then # torchrun has killed them
    say "no rank has saved in the $after s since SIG$stopped; go on with --resume"
    return 69
  fi
  say "SIG$stopped came before there was anything to save; go on with --resume"
  [[ $stopped == INT ]] && return 130
  return 75
}
