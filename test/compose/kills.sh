# shellcheck shell=bash
# Killing containers under load.

# As a crash or the kernel's OOM killer does: from outside, behind Docker's back. The restart policy has to bring it back.
kill_process() {
  local id pid
  id=$(container "$1")
  pid=$(docker inspect -f '{{.State.Pid}}' "$id")
  [ "$pid" != 0 ] || return 0 # dead already
  echo "killing the first process of $1"
  if ! kill -9 "$pid" 2>/dev/null; then kill_container "$1"; fi # only root may, and only where Docker runs on this machine
}

# Docker takes `docker kill` for an operator's wish: a killed container stays down, whatever its restart policy, until it is started.
kill_container() {
  echo "docker kill $1"
  docker kill "$(container "$1")" && sleep 1 && compose up -d --wait
}

# demo_under HOW: the load generator plays, and each service is killed, in any order, as often as there is time for.
demo_under() {
  local how=$1 service demo killed=' '
  compose run --rm -T demo --calls 1000 --turns 40 --rate 300 >"$work/demo.log" 2>&1 &
  demo=$!
  within 30 grep -q 'turns sent' "$work/demo.log" || return 1
  for service in $(shuf -e sink ingest redis postgres) $(shuf -e sink ingest redis postgres); do
    sleep 1
    kill -0 $demo 2>/dev/null || break
    "$how" "$service" && within 60 is_healthy "$service" || return 1
    killed+="$service "
  done
  wait $demo
  local code=$?
  tail -25 "$work/demo.log"
  for service in sink ingest redis postgres; do
    [[ $killed == *" $service "* ]] || { echo "the demo was over before $service was killed"; return 1; }
  done
  [ $code -eq 0 ] && grep -q 'Everything is there, each turn once.' "$work/demo.log"
}

# It exits with 2 as long as there is no Redis, and Docker starts it again and again.
ingest_waits_for_redis() {
  docker kill "$(container redis)" && docker kill "$(container ingest)" && docker start "$(container ingest)" || return 1
  within 30 has_restarted ingest || return 1
  docker logs --tail 3 "$(container ingest)" 2>&1 | grep -q 'REDIS_URL: ' || { docker logs --tail 5 "$(container ingest)"; return 1; }
  docker start "$(container redis)" && within 60 is_healthy ingest
}
has_restarted() { [ "$(docker inspect -f '{{.RestartCount}}' "$(container "$1")")" -ge 1 ]; }
