# shellcheck shell=bash
# What test/compose/run asserts of containers. Each function succeeds or says on standard output why not.

# claim NAME COMMAND…: runs it, quietly unless it fails.
claim() {
  local name=$1 from=$SECONDS
  shift
  if "$@" >"$work/out" 2>&1; then
    printf 'ok      %-62s %4d s\n' "$name" $((SECONDS - from))
  else
    printf 'FAILED  %-62s %4d s\n' "$name" $((SECONDS - from))
    sed 's/^/        /' "$work/out" | tail -40
    failures+=("$name")
  fi
}

# within SECONDS COMMAND…: until it succeeds.
within() {
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    if [ $SECONDS -ge $until ]; then echo "in vain: $*"; return 1; fi
    sleep 0.5
  done
}

# Of all that a service has had, the one that is there.
container() { compose ps -a -q "$1" | head -1; }
health_of() { docker inspect -f '{{.State.Health.Status}}' "$(container "$1")"; }
is_healthy() { [ "$(health_of "$1")" = healthy ]; }
is_unhealthy() { [ "$(health_of "$1")" = unhealthy ]; }
running() { compose ps --services --status running; }

secret_is_named() {
  local name
  for name in POSTGRES_PASSWORD REDIS_PASSWORD INGEST_TOKENS GRAFANA_ADMIN_PASSWORD; do
    sed "s/^$name=.*/$name=/" "$work/env" >"$work/env.without"
    local said
    if said=$(docker compose --env-file "$work/env.without" --profile grafana config -q 2>&1); then echo "$name is not missed"; return 1; fi
    grep -q "copy .env.example to .env and set $name there" <<<"$said" || { echo "$said"; return 1; }
  done
}

comes_up() { compose up --wait; }

no_root() {
  local service users
  for service in $(running); do
    users=$(docker top "$(container "$service")" -eo pid,uid,args | awk 'NR > 1 && $3 != "runc" { print $2, $3 }')
    # A runuser that waits for the server is the stand-in image's: the official one becomes postgres.
    [ "$service" = postgres ] && users=$(grep -v ' runuser' <<<"$users")
    [ -n "$users" ] || { echo "$service runs nothing"; return 1; }
    if grep '^0 ' <<<"$users"; then echo "in $service"; return 1; fi
  done
}

read_only_root() {
  local service said
  for service in $(running); do
    said=$(compose exec -T -u 0 "$service" sh -c 'echo x > /x' 2>&1) && { echo "$service can write /x"; return 1; }
    grep -qi 'read-only' <<<"$said" || { echo "$service: $said"; return 1; }
  done
}

no_capabilities() {
  local service status
  for service in $(running | grep -v postgres); do
    status=$(compose exec -T "$service" sh -c 'cat /proc/1/status')
    grep -q '^CapBnd:[[:space:]]*0*$' <<<"$status" && grep -q '^NoNewPrivs:[[:space:]]*1$' <<<"$status" || { echo "$service: $status"; return 1; }
  done
}

loopback_only() {
  local id outside
  for id in $(compose ps -q); do
    if docker port "$id" | grep -v ' 127\.0\.0\.1:'; then return 1; fi
  done
  [ -z "$(docker port "$(container redis)")$(docker port "$(container postgres)")" ] || { echo 'a store is published'; return 1; }
  curl -sf "http://127.0.0.1:$ingest_port/healthz" || { echo 'loopback does not reach ingest'; return 1; }
  outside=$(hostname -I | cut -d' ' -f1)
  if curl -sf --max-time 3 "http://$outside:$ingest_port/healthz"; then echo "$outside reaches ingest"; return 1; fi
  # And with loopback: not without a token.
  [ "$(curl -s -o /dev/null -w '%{http_code}' -X POST -d '{}' "http://127.0.0.1:$ingest_port/v1/events")" = 401 ]
}

wrong_setting() {
  local said code
  said=$(compose run --rm -T --no-deps -e SINK_WORKERS=none sink 2>&1)
  code=$?
  [ $code -eq 2 ] && grep -q 'SINK_WORKERS: wants an integer' <<<"$said" || { echo "exit code $code: $said"; return 1; }
}

prometheus_sees() { # JOB COUNT
  local found
  found=$(curl -sf -G "http://127.0.0.1:$prometheus_port/api/v1/query" --data-urlencode "query=sum(up{job=\"$1\"})")
  grep -q "\"$2\"\]" <<<"$found"
}

scales() {
  compose up -d --wait --scale sink=2 && within 60 prometheus_sees sink 2 && within 60 prometheus_sees ingest 1 &&
    compose run --rm demo --calls 20 --rate 500
}

# The state that Docker shows, after its retries, and back again.
health_follows() {
  local said
  docker kill "$(container postgres)" && within 20 sink_is_not_ready && within 120 is_unhealthy sink || return 1
  said=$(compose exec -T sink calltape health) || { echo "alive, but: $said"; return 1; } # who is alive must not be killed for it
  docker start "$(container postgres)" && within 120 is_healthy sink
}
sink_is_not_ready() { ! compose exec -T sink calltape health sink --ready; }

stops_cleanly() {
  local service state
  compose stop ingest sink || return 1
  for service in ingest sink; do
    state=$(docker inspect -f '{{.State.ExitCode}} {{.State.OOMKilled}}' "$(container $service)")
    [ "$state" = '0 false' ] || { echo "$service: $state"; return 1; }
  done
  compose up -d --wait
}

rows() { compose exec -T postgres psql -qtA -U calltape -c 'SELECT count(*) FROM call_transcript_turns'; }
keys() { compose exec -T redis redis-cli dbsize; }
keeps_data() {
  local before after
  before="$(rows) rows, $(keys) keys"
  compose --profile demo down --timeout 20 && compose up --wait || return 1
  after="$(rows) rows, $(keys) keys"
  echo "$before; then $after"
  [ "$before" = "$after" ] && [ "${before%% *}" -gt 1000 ] && compose exec -T sink calltape verify
}
