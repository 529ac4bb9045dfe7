// Node.js http and pg: one statement for each webhook, INSERT … ON CONFLICT DO NOTHING.
import { createServer } from "node:http";
import { createTable, isSigned, pool, port } from "./shared.mjs";

const INSERT =
  "INSERT INTO results (request_id, body, received_at) VALUES ($1, $2, now()) ON CONFLICT (request_id) DO NOTHING";

function answer(response, status, content) {
  const body = JSON.stringify(content);
  response.writeHead(status, { "content-type": "application/json", "content-length": Buffer.byteLength(body) });
  response.end(body);
}

const server = createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", async () => {
    const body = Buffer.concat(parts);
    if (!isSigned(request.headers["x-clipia-signature"], body)) {
      answer(response, 401, { error: "invalid signature" });
      return;
    }
    try {
      const { request_id: id } = JSON.parse(body);
      const { rowCount } = await pool.query({ name: "insert", text: INSERT, values: [id, body] });
      answer(response, 200, { status: rowCount ? "accepted" : "duplicate" });
    } catch {
      answer(response, 503, { error: "not stored" });
    }
  });
});

await createTable();
server.listen(port, "127.0.0.1");
