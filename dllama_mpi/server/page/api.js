// Calls of the server.

export class ApiError extends Error {}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(answer) {
  if (answer.ok) return answer;
  let said = `the server answers ${answer.status}`;
  try {
    said = (await answer.json()).error.message ?? said;
  } catch {
    // not JSON: the status has to do
  }
  throw new ApiError(said);
}

export async function get(path, key) {
  return (await checked(await fetch(path, { headers: headers(key) }))).json();
}

// Yield the chunks of a chat completion as they come.
export async function* chat(body, key, signal) {
  const answer = await checked(
    await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify({ ...body, stream: true }), signal }),
  );
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the connection was cut");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data === undefined) continue; // a comment
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      yield chunk;
    }
  }
}
