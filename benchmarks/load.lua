-- For wrk: sends requests of one size from a file, each once, and reports what came back as one line of JSON.
local file, size

function init(arguments)
  file = assert(io.open(arguments[1], "rb"))
  size = tonumber(arguments[2])
end

function request()
  local whole = file:read(size)
  if not whole then
    io.stderr:write('{"exhausted": true}\n')
    os.exit(1)
  end
  return whole
end

function done(summary, latency)
  local failed = summary.errors
  io.stderr:write(string.format(
    '{"requests": %d, "microseconds": %d, "p50": %d, "p95": %d, "p99": %d, "max": %d, "failed": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(95), latency:percentile(99),
    latency.max, failed.connect + failed.read + failed.write + failed.status + failed.timeout))
end
