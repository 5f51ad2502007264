// Asking the server this page came from. The key is kept in this object alone and ends with the page.

const access = { key: "" };

class Failure extends Error {
  constructor(message, { code = null, retryAfter = null } = {}) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function request(path, { method = "GET", body, signal } = {}) {
  const headers = access.key ? { Authorization: `Bearer ${access.key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const sent = body === undefined ? undefined : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, { method, headers, body: sent, signal, redirect: "error", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const failure = await failureOf(response);
  if (response.status === 401 || failure.code === "admin_key_required") askForKey(failure.code === "admin_key_required");
  throw failure;
}

async function failureOf(response) {
  const told = { code: null, retryAfter: Number(response.headers.get("Retry-After")) || null };
  try {
    const { error } = await response.json();
    return new Failure(error.message, { ...told, code: error.code });
  } catch {
    // A proxy in between answers in its own way.
    return new Failure(`${response.status} ${response.statusText}`, told);
  }
}

async function json(path, options) {
  const text = await (await request(path, options)).text();
  return text ? JSON.parse(text) : null;
}

function adapterPath(name, ...rest) {
  return ["/v1/adapters", ...[name, ...rest].map(encodeURIComponent)].join("/");
}

function askForKey(admin) {
  const form = byId("key");
  byId("key-label").textContent = admin ? "Admin key" : "Key";
  byId("key-error").textContent = access.key ? "The key that was given does not open this." : "";
  if (!form.hidden) return;
  form.hidden = false;
  byId("secret").value = "";
  byId("secret").focus();
}

function startKeys(go) {
  byId("key").addEventListener("submit", (event) => {
    event.preventDefault();
    access.key = byId("secret").value.trim();
    byId("secret").value = "";
    byId("key").hidden = true;
    go();
  });
}
