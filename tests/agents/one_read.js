// An extension of pi. The embedded model is too small to see that it needs a tool, and to spell a path:
// its first turn has to read notes.txt, once; its second has to answer.
const schema = {
  type: "object",
  properties: { path: { type: "string", enum: ["notes.txt"] } },
  required: ["path"],
  additionalProperties: false,
};

export default function (pi) {
  let turns = 0;
  pi.on("before_provider_request", ({ payload }) => {
    const isFirst = turns++ === 0;
    const [tool] = payload.tools;
    if (tool.input_schema) {
      const choice = isFirst ? { type: "any", disable_parallel_tool_use: true } : { type: "none" };
      return { ...payload, tools: [{ ...tool, input_schema: schema }], tool_choice: choice };
    }
    const narrowed = tool.function
      ? { ...tool, function: { ...tool.function, parameters: schema } }
      : { ...tool, parameters: schema };
    const choice = isFirst ? "required" : "none";
    return { ...payload, tools: [narrowed], tool_choice: choice, parallel_tool_calls: false };
  });
}
