-- Fills an empty schema with n ended, n parked and n queued processes, and a thousand held ones.
--     psql URL -v n=1000000 -f fill.sql
-- The oldest processes have ended and the newest are queued, over thirty days. A list of the newest processes in one
-- state is therefore slow if it scans the ids one by one.
\set ON_ERROR_STOP 1

CREATE FUNCTION pg_temp.uuid_v7(micros bigint, k bigint) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
  SELECT (lpad(to_hex(micros / 1000), 12, '0') || '7' || lpad(to_hex(k & 4095), 3, '0') || '8' || substr(md5(k::text), 1, 15))::uuid
$$;

CREATE TEMP TABLE r AS
SELECT k, k / :n AS part, now.us AS now_us, at, pg_temp.uuid_v7(at, k) AS id
FROM (SELECT (extract(epoch FROM now()) * 1000000)::bigint AS us) now,
     generate_series(0::bigint, 3 * :n + 999) k,
     LATERAL (SELECT now.us - 86400000000::bigint * 30 + 86400000000::bigint * 30 / (3 * :n + 1000) * k AS at) t;

-- Twenty live workers, and forty that are gone.
INSERT INTO worker (id, name, host, os_pid, version, queues, slots, load, drain, beat, beat_at, started_at, gone_at)
SELECT pg_temp.uuid_v7(now_us - 86400000000::bigint * 40, i), 'w' || i, 'host', 1, '0', 'default', 200, 0, false, 1, now_us,
       now_us - 86400000000::bigint * 40, CASE WHEN i > 20 THEN now_us - i * 1000000 END
FROM generate_series(1, 60) i, (SELECT now_us FROM r LIMIT 1) r;

-- Half of the parked processes are paused, some of them in a sleep that is over; half wait for a year.
INSERT INTO process (id, place, state, before, epoch, owner, claimed_at, seq, checkpoint, desired, urgent, control, woken,
                     wake_at, queue, told_at, try, deaths, queue_deadline, total_deadline, changed_at, ended_at, outcome)
SELECT id, (ARRAY[3, 2, 0, 1])[part + 1],
       CASE part WHEN 0 THEN CASE WHEN k % 100 < 97 THEN 4 WHEN k % 100 < 99 THEN 5 ELSE 6 END
                 WHEN 1 THEN CASE WHEN k % 2 = 0 THEN 3 ELSE 2 END
                 WHEN 2 THEN 0 ELSE 1 END,
       CASE WHEN part = 1 AND k % 4 = 0 THEN 2 ELSE 0 END, CASE WHEN part = 2 THEN 0 ELSE 1 END,
       CASE WHEN part = 3 THEN (SELECT w.id FROM worker w WHERE w.name = 'w' || (r.k % 20 + 1)) END,
       CASE WHEN part <> 2 THEN at END, CASE WHEN part = 2 THEN 0 ELSE 5 END,
       CASE WHEN part <> 2 THEN decode(repeat('ab', 150), 'hex') END, CASE WHEN part = 1 AND k % 2 = 0 THEN 1 ELSE 0 END,
       false, CASE WHEN part = 1 AND k % 2 = 0 THEN 1 ELSE 0 END, false,
       CASE WHEN part = 1 AND k % 2 = 1 THEN now_us + 86400000000::bigint * 365 + k
            WHEN part = 1 AND k % 4 = 0 THEN now_us - 1000 END,
       CASE WHEN k % 10 < 7 THEN 'default' WHEN k % 10 < 9 THEN 'default.high' ELSE 'gpu' END, at, 1, 0, NULL,
       CASE WHEN k % 10 = 0 THEN now_us + 86400000000::bigint * 365 END, at, CASE WHEN part = 0 THEN at + 60000000 END,
       CASE WHEN part = 0 THEN decode('0183a465786974cd0000a66f6bc3a6726561736f6ec0', 'hex') END
FROM r;

-- The body is `run: [echo, hello]` as Baton serialises it.
-- Every process has the label `campaign` = si. Each `batch` has a thousand processes. Three processes have `rare`.
INSERT INTO spec (id, name, kind, body, digest, labels, session, created_by, created_at, traceparent, queue)
SELECT id, 'job-' || k % 1000, CASE WHEN k % 3 < 2 THEN 'program' ELSE 'baton.count' END, decode('018aa46e616d65a36a6f62a47768617481a372756e81a46172677692a46563686fa568656c6c6fa47661727380a76f6b' ||
         '5f657869749100a5726574727982a36d617801a47761697484a56669727374a23173a6666163746f72cb400000000000' ||
         '0000a36d6178a331306da66a6974746572cb3fc999999999999aa66c6162656c7380a87072696f72697479a66e6f726d' ||
         '616ca57175657565a764656661756c74a4686f6c64c2a774696d656f757480', 'hex'),
       decode(md5(k::text) || md5(k::text), 'hex'),
       '{"batch":"' || k / 1000 || '","campaign":"si"' || CASE WHEN k % :n = 5 AND part < 3 THEN ',"rare":"yes"' ELSE '' END || '}',
       CASE WHEN k % :n = 5 AND part < 3 THEN 'rare' WHEN k % 2 = 0 THEN 'night' WHEN k % 10 = 1 THEN 's' || k / 500 END,
       'ann@host', at, '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
       CASE WHEN k % 10 < 7 THEN 'default' WHEN k % 10 < 9 THEN 'default.high' ELSE 'gpu' END
FROM r;

INSERT INTO label (key, value, id)
SELECT l.key, l.value, s.id FROM spec s, json_each_text(s.labels::json) l ORDER BY l.key, l.value, s.id;

INSERT INTO attempt (pid, epoch, worker, worker_name, try, started_at, ended_at, how, reason)
SELECT r.id, 1, w.id, w.name, 1, r.at, r.at + 60000000, 'ok', NULL
FROM r JOIN worker w ON w.name = 'w' || (r.k % 60 + 1) WHERE r.part = 0;

INSERT INTO output (pid, epoch, stream, head, tail, total_bytes)
SELECT id, 1, 1, 'hello'::bytea, ''::bytea, 5 FROM r WHERE part = 0;

INSERT INTO event (id, pid, request, at, what, target, by_whom, login, reason, outcome, settled_at)
SELECT pg_temp.uuid_v7(at, k), id, NULL, at, 'pause', NULL, 'ann@host', 'postgresql:baton', 'maintenance', 'applied', at
FROM r WHERE part = 1 AND k % 2 = 0;

DROP TABLE r;
VACUUM ANALYZE process, spec, label, attempt, output, event, worker;
