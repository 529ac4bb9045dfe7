// What both peers do alike: Clipia's signature over the raw body, a pool of connections, and the table.
import { createHmac, timingSafeEqual } from "node:crypto";
import process from "node:process";
import pg from "pg";

const TOLERANCE = 300; // seconds

export const port = Number(process.argv[process.argv.indexOf("--port") + 1]);
export const pool = new pg.Pool({ connectionString: process.env.RECEIVER_DATABASE_URL, max: 10 });

export async function createTable() {
  await pool.query(
    "CREATE TABLE IF NOT EXISTS results (request_id varchar(128) PRIMARY KEY, body bytea NOT NULL, " +
      "received_at timestamptz NOT NULL)",
  );
}

export function isSigned(header, body) {
  const fields = new Map((header ?? "").split(",").map((field) => field.split("=", 2)));
  const timestamp = fields.get("t") ?? "";
  if (!(Math.abs(Date.now() / 1000 - Number(timestamp)) <= TOLERANCE)) return false;
  const digest = createHmac("sha256", process.env.CLIPIA_WEBHOOK_SECRET)
    .update(`${timestamp}.`)
    .update(body)
    .digest();
  const given = Buffer.from(fields.get("v1") ?? "", "hex");
  return given.length === digest.length && timingSafeEqual(given, digest);
}
