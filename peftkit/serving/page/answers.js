// One streamed answer of /v1/chat/completions, with the times that a reader of the stream sees.

// Browsers open at most six connections to one server over HTTP/1.1; one is left for everything else.
const AT_ONCE = 5;

// The data of server-sent events, in order; a line may come in pieces.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function nothingTold() {
  return { reference: null, pieces: 0, tokens: null, finish: null, first: null, seconds: null };
}

// Asks one model; `onpiece` gets each piece of text, `told` what else is known so far, even if it breaks off.
async function answer(model, asked, signal, told, onpiece) {
  const started = performance.now();
  const response = await request("/v1/chat/completions", {
    method: "POST",
    signal,
    body: { ...asked, model, stream: true, stream_options: { include_usage: true } },
  });
  let ended = false;
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message || "The answer broke off.");
    const choice = (chunk.choices || [])[0];
    const text = choice?.delta?.content;
    if (text) {
      told.first ??= (performance.now() - started) / 1000;
      told.seconds = (performance.now() - started) / 1000;
      told.pieces += 1;
      onpiece(text);
    }
    if (choice?.finish_reason) told.finish = choice.finish_reason;
    if (chunk.usage) told.tokens = chunk.usage.completion_tokens;
    if (chunk.model && chunk.model !== model) told.reference = chunk.model;
  }
  if (!ended && told.finish === null) throw new Failure("The answer broke off before its end.");
}

// "first token 0.21 s · 34 tokens · 18.2 tokens/s"
function speed(told) {
  if (told.first === null) return [];
  const tokens = told.tokens ?? told.pieces;
  const between = told.seconds - told.first;
  const said = [`first token ${told.first.toFixed(2)} s`, count(tokens, told.tokens === null ? "piece" : "token")];
  if (tokens > 1 && between > 0) said.push(`${((tokens - 1) / between).toFixed(1)} tokens/s`);
  if (told.finish === "length") said.push("cut at the limit");
  return said;
}
