// What OpenAI's JavaScript client makes of a server, as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "How is the weather in Oslo?" }];
const sampling = { model: "chat", temperature: 0, max_tokens: 12 };
const city = { type: "string", enum: ["Oslo", "Lima"] };
const schema = { type: "object", properties: { city }, required: ["city"], additionalProperties: false };
const told = {};

const whole = await client.chat.completions.create({ ...sampling, messages });
told.whole = whole.choices[0].message.content;
told.usage = whole.usage;

const stream = await client.chat.completions.create({
  ...sampling, messages, stream: true, stream_options: { include_usage: true },
});
told.streamed = "";
for await (const chunk of stream) {
  told.streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) told.streamed_usage = chunk.usage;
}

const asked = [];
const runner = client.chat.completions.runTools({
  ...sampling, max_tokens: 60, messages, stream: true,
  tool_choice: { type: "function", function: { name: "weather" } },
  tools: [{
    type: "function",
    function: {
      name: "weather", description: "Tell the weather of a city.", parameters: schema, parse: JSON.parse,
      function: (given) => { asked.push(given); return `It rains in ${given.city}.`; },
    },
  }],
});
await runner.done();
told.call = asked[0];
told.tool_message = runner.messages.at(-1).content;

const parsed = await client.chat.completions.parse({
  ...sampling, max_tokens: 60, messages,
  response_format: { type: "json_schema", json_schema: { name: "place", strict: true, schema } },
});
told.structured = JSON.parse(parsed.choices[0].message.content);

told.events = [];
told.responses = "";
const events = await client.responses.create({
  model: "chat", temperature: 0, max_output_tokens: 12, input: messages[0].content, stream: true, store: false,
});
for await (const event of events) {
  if (told.events.at(-1) !== event.type) told.events.push(event.type);
  if (event.type === "response.output_text.delta") told.responses += event.delta;
}

const embeddings = await client.embeddings.create({ model: "embedding", input: ["A cat.", "A rug."] });
told.embeddings = embeddings.data.map((each) => each.embedding.length);

told.models = (await client.models.list()).data.map((model) => model.id);
told.errors = [];
for (const bad of [{ model: "nobody" }, { temperature: "hot" }]) {
  try {
    await client.chat.completions.create({ ...sampling, messages, ...bad });
  } catch (error) {
    told.errors.push({ kind: error.constructor.name, status: error.status, param: error.param, code: error.code });
  }
}
console.log(JSON.stringify(told));
