// Express and pg: the event is looked up, and inserted if it is new.
import express from "express";
import { createTable, isSigned, pool, port } from "./shared.mjs";

const app = express();

app.post("/clipia/webhook", express.raw({ type: "application/json" }), async (request, response) => {
  if (!isSigned(request.get("x-clipia-signature"), request.body)) {
    response.status(401).json({ error: "invalid signature" });
    return;
  }
  const { request_id: id } = JSON.parse(request.body);
  const { rows } = await pool.query("SELECT 1 FROM results WHERE request_id = $1", [id]);
  if (rows.length > 0) {
    response.json({ status: "duplicate" });
    return;
  }
  await pool.query("INSERT INTO results (request_id, body, received_at) VALUES ($1, $2, now())", [id, request.body]);
  response.json({ status: "accepted" });
});

await createTable();
app.listen(port, "127.0.0.1");
