// yyjson as one translation unit of the extension: the reader alone.
#define YYJSON_DISABLE_WRITER 1
#define YYJSON_DISABLE_UTILS 1
#define YYJSON_DISABLE_NON_STANDARD 1
#include "third_party/yyjson/yyjson.c"
